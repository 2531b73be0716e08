"""The hill climb, whole: stages in a row, from random weights to the consolidated model (MAI-Thinking-1 report §3).

Pre-training, mid-training, the specialists' climbs with self-distillation between them, consolidation, a last climb:
each is a run like any other, in a folder below the climb's, and goes on where it was when it is struck. Between the
stages nothing is kept in memory: what comes next is read from the disk (`experiments.plan`), by rank 0 for all.
The folder is all that processes need to share to work on one climb together.
"""

import gc
import itertools
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from mai_thinking.config.climb import ClimbConfig
from mai_thinking.config.command import EXIT_COLLAPSED, EXIT_INTERRUPTED
from mai_thinking.config.loading import save_config
from mai_thinking.config.storage import atomic_file
from mai_thinking.errors import RunError
from mai_thinking.experiments.plan import ClimbPlan, Stage
from mai_thinking.experiments.queue import WorkQueue
from mai_thinking.recipes.distill import self_distill
from mai_thinking.recipes.grpo import grpo
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.context import init_distributed
from mai_thinking.training.ledger import LAUNCHED_VARIABLE
from mai_thinking.training.stop import StopRequest

POLL_SECONDS = 2.0
RECIPES: dict[str, Callable[[Any], int]] = {"pretrain": pretrain, "grpo": grpo, "self_distill": self_distill}


def run_climb(
    config: ClimbConfig,
    *,
    report: Callable[[ClimbPlan], object] | None = None,
    report_stage: Callable[[Path], object] | None = None,
) -> int:
    """Run what `config` still lacks, stage by stage; the exit code.

    Several processes may do so at once, on any machine that sees the folder: each takes a stage whose inputs are there.
    A stage that collapses is answered as `config.reset` says; RunError if that is not allowed any more. `report_stage`
    writes the page of a stage that has ended, from its folder, and `report` that of the whole climb; both on rank 0.
    """
    with ExitStack() as stack:
        accelerator = init_distributed()
        stop = StopRequest()
        stack.callback(stop.close)
        queue = stack.enter_context(WorkQueue(config.folder)) if accelerator.process_index == 0 else None
        if queue is not None:
            with queue.planning(), atomic_file(config.folder / "config.yaml") as path:
                save_config(config, path)
        while (stage := _from_rank_0(_next_stage, queue, config)) is not None:
            if stage == "wait":
                time.sleep(POLL_SECONDS)
            else:
                # Leave nothing of an earlier stage here: the last model, its optimiser, and what DDP holds of them;
                # nor the precision, with another one of which the next `Accelerator` would refuse.
                gc.collect()
                AcceleratorState._reset_state()
                code = RECIPES[stage.run](stage.config)
                if code not in (0, EXIT_COLLAPSED):
                    return code
                if queue is not None and report_stage is not None:
                    report_stage(stage.folder.path)
            if stop.agreed():
                if queue is not None:
                    print("stopped between two stages; the same command goes on with the next", flush=True)
                return EXIT_INTERRUPTED
            os.environ[LAUNCHED_VARIABLE] = str(time.time())  # the next ledger is not to begin before now
        if queue is not None and report is not None:
            # Each process does, one after the other: none can know that it is the last.
            with queue.planning():
                plan = ClimbPlan(config)
                for stage in plan.stages:
                    if report_stage is not None and not (stage.folder.report / "summary.md").exists():
                        report_stage(stage.folder.path)  # whoever ran it died before
                report(plan)
                print(f"{config.name} is finished: see {config.folder / 'report' / 'summary.md'}", flush=True)
        accelerator.wait_for_everyone()
    return 0


def _from_rank_0(ask: Callable[[WorkQueue, ClimbConfig], Any], queue: WorkQueue | None, config: ClimbConfig) -> Any:
    """What `ask` gives rank 0, which alone has the queue, for all ranks."""
    found = [None if queue is None else ask(queue, config)]
    broadcast_object_list(found)
    return found[0]


def _next_stage(queue: WorkQueue, config: ClimbConfig) -> Stage | Literal["wait"] | None:
    """The next stage, ready to run: its folder is free, or its own. "wait" if all that could be run is others'; None
    when all is done."""
    with queue.planning():
        last = queue.release()
        plan = ClimbPlan(config)
        queue.log_once(plan.text() + "\n", "plan")
        ready = {stage.name: stage for stage in plan.ready}
        name = queue.take(ready)
        if name is None:
            if ready:
                queue.log_once(f"waiting for other processes, which run {', '.join(ready)}")
            return "wait" if ready else None
        stage = ready[name]
        if name == last:
            raise RunError(f"stage {name} ended and is not finished: {stage.state} {stage.why}".rstrip())
        if stage.state == "changed":
            numbered = (stage.folder.path.with_name(f"{name}-old-{number}") for number in itertools.count(1))
            aside = stage.folder.path.rename(next(path for path in numbered if not path.exists()))
            print(f"stage {name} is run again ({stage.why}); what it was is in {aside}", flush=True)
        plan.remember_inputs(stage)
        print(f"── stage {name}\n", flush=True)
        return stage
