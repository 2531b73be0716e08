"""What a run tells of itself while it runs: to its launcher that it moves, by heartbeats; and in a diary,
`events.jsonl`, which outlives every crash, where the time goes (`launch.goodput`)."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mai_thinking.training.metrics import open_log

PRODUCTIVE = "productive steps"
SLOW = "slow steps"
EVALUATION = "evaluation"
START_UP = "start-up"
RESTART = "restart"
RECOMPUTATION = "recomputation"
CHECKPOINT = "checkpoint stall"
DATA = "data stall"
OTHER = "other"
CATEGORIES = (PRODUCTIVE, SLOW, EVALUATION, START_UP, RESTART, RECOMPUTATION, CHECKPOINT, DATA, OTHER)
"""In the order in which tables and figures show them; every second of the wall-clock is in exactly one."""

LAUNCHED_VARIABLE = "MAI_LAUNCHED_AT"
"""The launcher tells the first attempt's workers in this environment variable when itself was started, in Unix time."""


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
            path = Path(folder, f"rank-{os.environ['RANK']}")
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


def read_heartbeat(folder: Path, rank: int) -> tuple[float, dict[str, Any]] | None:
    """(Unix time, content) of a rank's last beat, or None before the first."""
    path = folder / f"rank-{rank}"
    try:
        return path.stat().st_mtime, json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


class GoodputLedger:
    """Appends what a run does to `events.jsonl`, a line each, with the operating system when the call returns. Spans
    and steps follow one another and do not overlap; what lies between them is accounted as `other`. A call costs some
    ten microseconds. Only rank 0 keeps the ledger; elsewhere (`enabled=False`) nothing is written. On every rank each
    call also beats for the launcher's watchdog."""

    def __init__(self, path: Path | str, *, enabled: bool = True, heartbeat: Heartbeat | None = None):
        """Opens the ledger and begins an attempt, dated back to the start of this process, or of its launcher."""
        self.path = Path(path)
        self.enabled = enabled
        self._heartbeat = heartbeat or Heartbeat(self.path.parent)
        if not enabled:
            return
        self._descriptor = open_log(self.path)
        # Within an attempt the monotonic clock counts: nobody sets it.
        self._offset = time.time() - time.monotonic()
        started = float(os.environ.get(LAUNCHED_VARIABLE) or time.time() - seconds_since_process_start())
        self._write("attempt", time=round(started, 6), world=int(os.environ.get("WORLD_SIZE", 1)))

    def step(self, step: int, seconds: float, *, data_wait: float = 0.0) -> None:
        """A training step has just ended that took `seconds`, `data_wait` of them waiting for its data."""
        self._heartbeat.beat(step)
        self._write("step", step=step, seconds=round(seconds, 6), data_wait=round(data_wait, 6))

    @contextmanager
    def span(self, category: str) -> Iterator[None]:
        """The time inside belongs to `category`: `EVALUATION`, `CHECKPOINT` or `OTHER`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._heartbeat.beat()
            self._write("span", category=category, seconds=round(time.perf_counter() - begin, 6))

    def end(self, how: str) -> None:
        """The attempt ends in an orderly way: `done` or `interrupted` (saved on request)."""
        self._write("end", how=how)

    def _write(self, event: str, **values: Any) -> None:
        if self.enabled:
            record = {"event": event, "time": round(time.monotonic() + self._offset, 6), **values}
            os.write(self._descriptor, (json.dumps(record) + "\n").encode())


def seconds_since_process_start() -> float:
    """Wall-clock seconds since the kernel started this process; 0 where /proc does not tell."""
    try:
        # The second field, the program's name, may hold spaces; the 22nd is the start in clock ticks since boot.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
