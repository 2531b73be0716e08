"""`metrics.jsonl`: one record a step, each once, however often the run was interrupted.

After a restart the steps since the checkpoint are computed again. What the file already holds of them stays; the new
values must equal it bit for bit (MAI-Thinking-1 report §2.8), and then are not written a second time.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from mai_thinking.errors import RunError

Record = dict[str, Any]


class NotReproducedError(RunError):
    """What was computed again gave another result than the first time: the run is not deterministic."""


def not_reproduced(what: str) -> None:
    """Raise `NotReproducedError`. On a GPU, where a gradient's norm has come out otherwise in its last bit, it is only
    told: what was recorded first stays."""
    import torch  # not for readers of metrics

    message = f"{what}: the run is not deterministic, or its config, code, data, machine or number of ranks changed"
    if not torch.cuda.is_available():
        raise NotReproducedError(message)
    print(f"warning: {message}", file=sys.stderr, flush=True)


class MetricsLog:
    """Appends records to `path`, and compares those of steps that it already holds.

    A record has a `step` and, unless it is an ordinary training step, a `kind` ("evaluation"); there is one record for
    each (kind, step). One process of a run has the log (rank 0). A record is with the operating system when `append`
    returns, so that it survives the death of the process, and on the disk after `synchronise`, which belongs just
    before each checkpoint. A torn last line, which only the death of the machine can leave, is cut off.
    """

    def __init__(self, path: Path | str, *, tolerance: float = 0.0):
        """`tolerance`: the relative difference allowed between the two results of a step. Zero asks for the same bits;
        a run that goes on at another world size adds in another order and needs something like 1e-4."""
        self.path = Path(path)
        self.tolerance = tolerance
        self._descriptor = open_log(self.path)
        self._recorded = {_identity(record): record for record in read_records(self.path)}

    def append(self, record: Record, *, exact: tuple[str, ...] = ("loss", "grad_norm")) -> bool:
        """Write `record`, or, if its step is there already, compare the fields named in `exact` and write nothing.
        Returns whether it was written. NotReproducedError, naming the step, if a field differs."""
        before = self._recorded.get(_identity(record))
        if before is not None:
            self._compare(before, record, exact)
            return False
        line = (json.dumps(record) + "\n").encode()
        # One call for the whole line: no reader sees half of it.
        if os.write(self._descriptor, line) < len(line):
            raise OSError(28, "No space left on device", str(self.path))
        self._recorded[_identity(record)] = record
        return True

    def synchronise(self) -> None:
        """Wait until all records are on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Synchronise and close."""
        self.synchronise()
        os.close(self._descriptor)

    def _compare(self, before: Record, again: Record, exact: tuple[str, ...]) -> None:
        for name in exact:
            old, new = before.get(name), again.get(name)
            close = False
            if self.tolerance and isinstance(old, int | float) and isinstance(new, int | float):
                close = math.isclose(old, new, rel_tol=self.tolerance)
            if not close and json.dumps(old) != json.dumps(new):  # NaN is itself
                not_reproduced(
                    f"step {again['step']}, computed again after a restart, gave {name} {_spell(new)} where "
                    f"{self.path} has {_spell(old)}"
                )


def open_log(path: Path) -> int:
    """Open a file of lines, made if need be, for appending. It is shortened to the end of its last whole line first;
    that is told on stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        print(f"{path}: cut off a torn last line", file=sys.stderr, flush=True)
        os.truncate(descriptor, whole)
    return descriptor


def read_records(path: Path | str) -> list[Record]:
    """All whole records of a metrics or events file, in order; [] if there is none. A torn last line is left out, as is
    one that a machine's death damaged: that is told on stderr."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line) if line else None
        except ValueError:
            print(f"{path}: line {number} is damaged; left out", file=sys.stderr, flush=True)
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_metrics(path: Path) -> tuple[list[Record], list[Record]]:
    """(steps, evaluations) of the run in the folder `path`, as far as it has come."""
    records = read_records(path / "metrics.jsonl")
    steps = [record for record in records if "kind" not in record]
    return steps, [record for record in records if record.get("kind") == "evaluation"]


def _identity(record: Record) -> tuple[str, int]:
    return record.get("kind", "step"), record["step"]


def _spell(value: Any) -> str:
    return f"{value!r} ({value.hex()})" if isinstance(value, float) else repr(value)
