"""One run of scripts/grpo.py with its processes, as an experiment drives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from mai_thinking.config.shipped import SCRIPTS
from mai_thinking.errors import RunError
from mai_thinking.experiments.processes import climb_processes
from mai_thinking.provenance.record import read_lineage
from mai_thinking.training.metrics import Record, read_records
from mai_thinking.training.model_files import load_model


class ClimbRun:
    """Begun by `finish`; or goes on, if its folder is there."""

    without: str | None = None
    """A part that is taken out (`experiments.without`)."""
    launched: Sequence[str] = ()
    """Options of scripts/launch.py, if it is to run under that."""

    def __init__(self, command: Sequence[str], folder: Path, threads: int) -> None:
        """`command`: what scripts/grpo.py is given."""
        self.command, self.folder, self.threads = [*command, f"output_dir={folder}"], folder, threads
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def finished(self) -> bool:
        """Whether its model is there."""
        return (self.folder / "final").is_dir()

    @property
    def over(self) -> bool:
        """Whether it does not run now."""
        return self.process is None or self.process.poll() is not None

    @property
    def steps(self) -> list[Record]:
        """The records of its gradient steps."""
        return [r for r in read_records(self.folder / "metrics.jsonl") if "kind" not in r]

    def ensure_started(self) -> None:
        """Begin, or go on, if it does not run."""
        if not self.over:
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        script = [str(SCRIPTS / "grpo.py")]
        if self.without:
            script = ["-m", "mai_thinking.experiments.without", self.without, *script]
        elif self.launched:
            script = [str(SCRIPTS / "launch.py"), *self.launched, *script]
        with open(f"{self.folder}.log", "ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
            self.process = subprocess.Popen(
                [sys.executable, *script, *self.command], env=environment, stdout=log, stderr=log
            )

    def wait(self) -> int:
        """For the end of its process; → the exit code."""
        assert self.process is not None
        return self.process.wait()

    def finish(self, *, until: int | None = None, beside: Callable[[], None] | None = None) -> None:
        """Start if need be, and wait for the end; or for step `until`, where it is stopped. `beside` is called
        meanwhile, often. RunError if it fails."""
        if self.finished or (until is not None and self._reached(until)):
            return
        self.ensure_started()
        assert self.process is not None
        while self.process.poll() is None:
            if until is not None and self._reached(until):
                self.process.send_signal(signal.SIGTERM)
                until = None
            if beside is not None:
                beside()
            time.sleep(0.2)
        if self.process.returncode not in (0, 75):
            raise RunError(f"{self.folder}: exit code {self.process.returncode}; see {self.folder}.log")

    def processes(self) -> dict[str, list[int]]:
        """Process ids by kind: `learner`, `worker`, `grader`."""
        assert self.process is not None
        return {"learner": [self.process.pid], **climb_processes(self.process.pid)}

    def weights(self) -> dict[str, torch.Tensor]:
        """Of its last model."""
        return load_model(self.folder / "final").state_dict()

    def differences(self, other: "ClimbRun") -> int:
        """Tensors of the two last models that are not equal to the last bit."""
        mine, theirs = self.weights(), other.weights()
        return sum(not torch.equal(mine[name], theirs[name]) for name in mine)

    def _reached(self, step: int) -> bool:
        return bool(self.steps) and self.steps[-1]["step"] >= step


def commits_of(runs: Iterable[Path]) -> list[str]:
    """Of the code that made these finished runs."""
    code = [version for run in runs for version in read_lineage(run / "final").record.code]
    return sorted({version.commit for version in code if version.commit})
