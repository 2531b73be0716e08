"""Many pre-training runs in one folder: claimed one by one by whoever works there, resumed, never run twice.

The folder holds `runs/NAME/`, `claims/` (a lock for each run, which the system takes back from a process that dies) and
`logs/NAME.txt`. Workers on other machines need nothing but the same folder.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path

from mai_thinking.config.command import EXIT_FAILED, EXIT_INTERRUPTED
from mai_thinking.errors import RunError
from mai_thinking.experiments.ladder_plan import PlannedRun
from mai_thinking.experiments.probes import probing
from mai_thinking.experiments.queue import WorkQueue
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.stop import StopRequest

POLL_SECONDS = 2.0


def work(folder: Path, runs: Sequence[PlannedRun], *, told: Callable[[PlannedRun], str], wait: bool = False) -> int:
    """Train, in the given order, what nobody has trained or is training; returns the exit code. A run that fails is
    told, and the others go on. `told` is called after each run, and what it returns is printed. With `wait` this
    returns when the others' runs are finished too: what comes next needs them all."""
    failed: set[str] = set()
    with WorkQueue(folder) as queue, closing(StopRequest()) as stop:
        while not stop.requested:
            with queue.planning():
                left = {run.name: run for run in runs if not run.folder.finished and run.name not in failed}
                name = queue.take(left)
            if name is None and wait and left:
                time.sleep(POLL_SECONDS)
                continue
            if name is None:
                return EXIT_FAILED if failed else 0
            try:
                if train(folder, left[name]) == EXIT_INTERRUPTED:
                    break
            except RunError as error:
                print(f"{name} failed: {error}")
                failed.add(name)
            else:
                print(told(left[name]), flush=True)
    return EXIT_INTERRUPTED


def train(folder: Path, run: PlannedRun) -> int:
    """Train one run, or go on with it; returns the exit code. What it says goes to `logs/NAME.txt`."""
    log = folder / "logs" / f"{run.name}.txt"
    log.parent.mkdir(exist_ok=True)
    begin = time.perf_counter()
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), probing(run.probe):
        code = pretrain(run.config)
    if code == 0:
        run.folder.note(wall=time.perf_counter() - begin)
        shutil.rmtree(run.folder.checkpoints, ignore_errors=True)  # many runs; nobody goes on with a finished one
    return code
