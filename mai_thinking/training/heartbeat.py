"""How a rank tells its launcher that it moves: a small file that is written at every step."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

HEARTBEAT_VARIABLE = "MAI_HEARTBEATS"
"""The launcher names a folder in this environment variable; each rank's heartbeat is a file in it."""


class Heartbeat:
    """Tells the launcher which step this rank has reached; without a launcher it does nothing. A beat is one write to a
    file, some microseconds. `GoodputLedger` beats for the loop."""

    def __init__(self, output_dir: Path):
        """`output_dir`: the run's folder, which the launcher's fault injection needs to find checkpoints."""
        self._saves_jit = False
        self._step = 0
        self._descriptor: int | None = None
        self._output_dir = str(output_dir.resolve())
        if folder := os.environ.get(HEARTBEAT_VARIABLE):
            path = heartbeat_path(Path(folder), int(os.environ["RANK"]))
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)

    def announce(self, can_save_jit: bool) -> None:
        """Whether this rank would save the whole state if another died: the launcher then gives it the time."""
        self._saves_jit = can_save_jit
        self.beat()

    def beat(self, step: int | None = None) -> None:
        """Step `step` is complete; without one, the rank moves on within what it does between steps."""
        self._step = self._step if step is None else step
        if self._descriptor is not None:
            record = json.dumps({"step": self._step, "output_dir": self._output_dir, "can_save_jit": self._saves_jit})
            os.pwrite(self._descriptor, record.ljust(4096).encode(), 0)


def heartbeat_path(folder: Path, rank: int) -> Path:
    """The file of a rank's heartbeat; its time of modification is the time of the last beat."""
    return folder / f"rank-{rank}"


def read_heartbeat(folder: Path, rank: int) -> tuple[float, dict[str, Any]] | None:
    """(Unix time, content) of a rank's last beat, or None before the first."""
    path = heartbeat_path(folder, rank)
    try:
        return path.stat().st_mtime, json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def can_save_jit(file: BinaryIO) -> bool:
    """What a heartbeat's open file says of its rank, also when a later attempt's has taken its path."""
    file.seek(0)
    try:
        return bool(json.loads(file.read())["can_save_jit"])
    except ValueError:  # before the first beat
        return False
