"""The hill climb, whole: stages in a row, from random weights to the consolidated model (MAI-Thinking-1 report §3).

Pre-training, mid-training, the specialists' climbs with self-distillation between them, consolidation, a last climb:
each is a run like any other, in a folder below the climb's, and goes on where it was when it is struck. Between the
stages nothing is kept in memory: what comes next is read from the disk (`climb_plan`), by rank 0 for all.
"""

import gc
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from mai_thinking.climb_plan import ClimbPlan, Stage
from mai_thinking.climb_report import write_report
from mai_thinking.config.climb import ClimbConfig
from mai_thinking.config.command import EXIT_COLLAPSED, EXIT_INTERRUPTED
from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import save_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.distillation import self_distill
from mai_thinking.errors import RunError
from mai_thinking.pretraining import pretrain
from mai_thinking.rl.trainer import climb
from mai_thinking.training.goodput import CAUSE_VARIABLE, LAUNCHED_VARIABLE
from mai_thinking.training.run_folder import atomic_file, locked
from mai_thinking.training.worker import StopRequest


def run_climb(config: ClimbConfig, report: Callable[[ClimbPlan], None] = write_report) -> int:
    """Run what `config` still lacks, stage by stage, then write the page of results with `report`; the exit code.

    A stage that collapses is answered as `config.reset` says; RunError if that is not allowed any more.
    """
    with ExitStack() as stack:
        accelerator = Accelerator()  # the ranks meet
        rank = accelerator.process_index
        if rank == 0:
            stack.enter_context(locked(config.folder))
            with atomic_file(config.folder / "config.yaml") as path:
                save_config(config, path)
        stop = StopRequest()
        stack.callback(stop.close)
        before: Stage | None = None
        while (stage := _next_stage(config, rank, before)) is not None:
            _clear_memory()
            if before is not None:
                _begin_anew()
            code = _run(stage)
            if code not in (0, EXIT_COLLAPSED):
                return code
            if stop.agreed():
                _say(rank, f"stopped after stage {stage.name}; the same command goes on with the next")
                return EXIT_INTERRUPTED
            before = stage
        if rank == 0:
            report(ClimbPlan(config))
            _say(rank, f"{config.name} is finished: see {config.folder / 'report' / 'summary.md'}")
        accelerator.wait_for_everyone()
    return 0


def _next_stage(config: ClimbConfig, rank: int, before: Stage | None) -> Stage | None:
    """What comes after `before`, ready to run: its folder is free, or its own. Collective; rank 0 looks and decides."""
    found: list[Any] = [None]
    if rank == 0:
        plan = ClimbPlan(config)
        stage = plan.next
        if stage is not None and before is not None and stage.name == before.name:
            raise RunError(f"stage {stage.name} ended and is not finished: {stage.state} {stage.why}".rstrip())
        if before is None:
            print(plan.text() + "\n", flush=True)
        if stage is not None:
            if stage.state == "changed":
                aside = _move_aside(stage.folder.path)
                print(f"stage {stage.name} is run again ({stage.why}); what it was is in {aside}", flush=True)
            plan.remember_inputs(stage)
            print(f"── stage {stage.name}\n", flush=True)
        found = [stage]
    broadcast_object_list(found)
    result: Stage | None = found[0]
    return result


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
    """The next ledger is not to begin with this process, nor with the fault that an earlier stage was restarted for."""
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
