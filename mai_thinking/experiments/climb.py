"""The hill climb, whole: stages in a row, from random weights to the consolidated model (MAI-Thinking-1 report §3).

Pre-training, mid-training, the specialists' climbs with self-distillation between them, consolidation, a last climb:
each is a run like any other, in a folder below the climb's, and goes on where it was when it is struck. Between the
stages nothing is kept in memory: what comes next is read from the disk (`experiments.plan`), by rank 0 for all.
The folder is all that processes need to share to work on one climb together.
"""

import gc
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from mai_thinking.config.climb import ClimbConfig
from mai_thinking.config.command import EXIT_COLLAPSED, EXIT_INTERRUPTED
from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import save_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.storage import atomic_file
from mai_thinking.errors import RunError
from mai_thinking.experiments.plan import ClimbPlan, Stage
from mai_thinking.recipes.distill import self_distill
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.report.climb import write_report
from mai_thinking.rl.trainer import climb
from mai_thinking.training.context import init_distributed
from mai_thinking.training.goodput import CAUSE_VARIABLE, LAUNCHED_VARIABLE
from mai_thinking.training.worker import StopRequest

WAIT = "wait"
POLL_SECONDS = 2.0


def run_climb(config: ClimbConfig, report: Callable[[ClimbPlan], None] = write_report) -> int:
    """Run what `config` still lacks, stage by stage, then write the page of results with `report`; the exit code.

    Several processes may do so at once, on any machine that sees the folder: each takes a stage whose inputs are there.
    A stage that collapses is answered as `config.reset` says; RunError if that is not allowed any more.
    """
    with ExitStack() as stack:
        accelerator = init_distributed()
        rank = accelerator.process_index
        stop = StopRequest()
        stack.callback(stop.close)
        desk = stack.enter_context(_Desk(config)) if rank == 0 else None
        while (stage := _next_stage(desk)) is not None:
            if isinstance(stage, str):
                time.sleep(POLL_SECONDS)
            else:
                _clear_memory()
                code = _run(stage)
                if code not in (0, EXIT_COLLAPSED):
                    return code
            if stop.agreed():
                _say(rank, "stopped between two stages; the same command goes on with the next")
                return EXIT_INTERRUPTED
            _begin_anew()
        if desk is not None:
            desk.conclude(report)
        accelerator.wait_for_everyone()
    return 0


def _next_stage(desk: "_Desk | None") -> Stage | str | None:
    """What rank 0 gets from the desk, for all ranks."""
    found: list[Any] = [desk.take() if desk is not None else None]
    broadcast_object_list(found)
    stage: Stage | str | None = found[0]
    return stage


class _Desk:
    """Where the processes that work on a climb take its stages: one of them looks at the plan at a time, and a stage is
    whose lock it holds (`claims/NAME.lock`). The system takes back the lock of a process that died."""

    def __init__(self, config: ClimbConfig) -> None:
        self.config = config
        self._claims = config.folder / "claims"
        self._claims.mkdir(parents=True, exist_ok=True)
        self._looking = FileLock(self._claims / ".plan.lock")
        self._mine: tuple[str, FileLock] | None = None  # the stage that is this process's, and its lock
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        with self._looking, atomic_file(self.config.folder / "config.yaml") as path:
            save_config(self.config, path)
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def take(self) -> Stage | str | None:
        """Let go of the last stage and take the next, ready to run: its folder is free, or its own. `WAIT` if all that
        could be run is others'; None when all is done."""
        with self._looking:
            mine = self._let_go()
            plan = ClimbPlan(self.config)
            self._say_once(plan.text() + "\n", "plan")
            for stage in plan.ready:
                claim = FileLock(self._claims / f"{stage.name}.lock")
                try:
                    claim.acquire(timeout=0)
                except Timeout:
                    continue
                self._mine = stage.name, claim
                if stage.name == mine:
                    raise RunError(f"stage {mine} ended and is not finished: {stage.state} {stage.why}".rstrip())
                if stage.state == "changed":
                    aside = _move_aside(stage.folder.path)
                    print(f"stage {stage.name} is run again ({stage.why}); what it was is in {aside}", flush=True)
                plan.remember_inputs(stage)
                print(f"── stage {stage.name}\n", flush=True)
                return stage
            if not plan.ready:
                return None
            others = ", ".join(stage.name for stage in plan.ready)
            self._say_once(f"waiting for other processes, which run {others}", others)
            return WAIT

    def conclude(self, report: Callable[[ClimbPlan], None]) -> None:
        """Write the page of results. Each process does, one after the other: none can know that it is the last."""
        with self._looking:
            report(ClimbPlan(self.config))
            page = self.config.folder / "report" / "summary.md"
            print(f"{self.config.name} is finished: see {page}", flush=True)

    def _let_go(self) -> str:
        """Give back the stage that was this process's; its name, or nothing."""
        if self._mine is None:
            return ""
        (name, claim), self._mine = self._mine, None
        claim.release()
        return name

    def _say_once(self, text: str, key: str) -> None:
        if key not in self._said:
            self._said.add(key)
            print(text, flush=True)


def _run(stage: Stage) -> int:
    """By the function of the script that its kind names."""
    match stage.config:
        case PretrainConfig():
            return pretrain(stage.config)
        case GrpoConfig():
            return climb(stage.config)
        case DistillConfig():
            return self_distill(stage.config)


def _clear_memory() -> None:
    """Leave nothing of an earlier stage in this process."""
    gc.collect()  # the last model, its optimiser, and what DDP holds of them
    # Precision is kept there; with another one the next `Accelerator` would refuse. The ranks' connection stays.
    AcceleratorState._reset_state()


def _begin_anew() -> None:
    """The next ledger is not to begin before now, nor with the fault that an earlier stage was restarted for."""
    os.environ[LAUNCHED_VARIABLE] = str(time.time())
    os.environ.pop(CAUSE_VARIABLE, None)


def _move_aside(folder: Path) -> Path:
    """Give a stage's folder the first free name of FOLDER-old-1, FOLDER-old-2, …; returns it."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-old-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)
