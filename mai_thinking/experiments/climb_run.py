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
from mai_thinking.provenance.lineage import read_lineage
from mai_thinking.training.metrics import Record, read_metrics
from mai_thinking.training.model_files import load_model


class ClimbRun:
    """Begun by `finish`; or goes on, if its folder is there."""

    def __init__(self, command: Sequence[str], folder: Path, threads: int = 1, under: Sequence[str] = ()) -> None:
        """`command`: what scripts/grpo.py is given. `under`: what Python runs that with, if it is not to run alone."""
        self.command = [sys.executable, *under, str(SCRIPTS / "grpo.py"), *command, f"output_dir={folder}"]
        self.folder, self.threads = folder, threads
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def finished(self) -> bool:
        """Whether its model is there."""
        return (self.folder / "final").is_dir()

    @property
    def steps(self) -> list[Record]:
        """The records of its gradient steps."""
        return read_metrics(self.folder)[0]

    def finish(
        self, *, until: int | None = None, beside: Callable[[], None] | None = None, ends: Sequence[int] = (0, 75)
    ) -> None:
        """Begin, or go on, and wait for the end; or for step `until`, where it is stopped. `beside` is called
        meanwhile, often. RunError for an exit code that is not in `ends`."""
        if self.finished or (until is not None and self._reached(until)):
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.folder}.log", "ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=log)
        while self.process.poll() is None:
            if until is not None and self._reached(until):
                self.process.send_signal(signal.SIGTERM)
                until = None
            if beside is not None:
                beside()
            time.sleep(0.2)
        if self.process.returncode not in ends:
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


def climb_processes(trainer: int) -> dict[str, list[int]]:
    """Process ids of the `worker`s and `grader`s of the trainer with this id. Linux."""
    running: list[tuple[int, int, str]] = []  # id, parent's id, command
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            running.append((int(path.name), parent, (path / "cmdline").read_bytes().decode(errors="replace")))
        except (OSError, IndexError):  # it has ended
            continue

    def children(parents: list[int], word: str) -> list[int]:
        return sorted(pid for pid, parent, command in running if parent in parents and word in command)

    workers = children(children([trainer], "forkserver"), "forkserver")
    return {"worker": workers, "grader": children([trainer, *workers], "grading_worker")}


def commits_of(runs: Iterable[Path]) -> list[str]:
    """Of the code that made these finished runs."""
    code = [version for run in runs for version in read_lineage(run / "final").record.code]
    return sorted({version.commit for version in code if version.commit})
