"""Many pre-training runs in one folder: planned, claimed one by one by whoever works there, resumed, never run twice.

The folder holds `runs/NAME/`, `claims/` (a lock for each run, which the system takes back from a process that dies),
`logs/NAME.txt`, and in `tokenizer/` what all read with. Workers on other machines need nothing but the same folder.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import torch

from mai_thinking.bench.learner import BenchLearner
from mai_thinking.bench.measure import aligned, alternate
from mai_thinking.config.command import EXIT_FAILED, EXIT_INTERRUPTED
from mai_thinking.config.ladder import Probe
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.storage import atomic_folder
from mai_thinking.data import PreparedData
from mai_thinking.errors import RunError
from mai_thinking.experiments.probes import probing
from mai_thinking.experiments.queue import WorkQueue
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.model_files import model_config
from mai_thinking.training.plan import quantity
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.stop import StopRequest

POLL_SECONDS = 2.0
_MEASURED_STEPS = 5
_LONGEST_STEP = 10.0
"""Seconds; steps expected to take longer are not tried but reckoned from the FLOPs of a smaller run."""


@dataclass(frozen=True)
class PlannedRun:
    """One of the runs."""

    variant: str
    config: PretrainConfig
    probe: Probe | None = None

    @property
    def name(self) -> str:
        """Also its folder's."""
        return self.config.name

    @property
    def folder(self) -> RunFolder:
        """Where it lives."""
        return RunFolder(self.config.folder)

    @cached_property
    def architecture(self) -> MaiThinkingConfig:
        """Of the model, as far as it is known without a tokenizer."""
        return model_config(self.config)

    @property
    def rung(self) -> int:
        """The depth."""
        return self.architecture.num_hidden_layers

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.config.steps * self.config.batch.tokens_per_step

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.architecture.flops_per_token(self.config.batch.context_length) * self.tokens


def share_tokenizer(folder: Path, data: PreparedData) -> Path:
    """Keep the tokenizer of `data` for all runs of `folder`, unless one is there; returns its path."""
    shared = folder / "tokenizer"
    with WorkQueue(folder).planning():
        if not shared.exists():
            with atomic_folder(shared) as path:
                data.tokenizer.save_pretrained(path)
    return shared


# ---------------------------------------------------------------------------------------------------------- training


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


# ---------------------------------------------------------------------------------- what they cost, before they do


def plan_table(runs: Sequence[PlannedRun]) -> str:
    """A line for each variant and depth, and the total of what is not yet done."""
    rows = [["config", "rung", "runs", "done", "total", "active", "tokens", "steps", "FLOPs", "s/step", "hours"]]
    groups: dict[tuple[str, int], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.variant, run.rung), []).append(run)
    measured: dict[str, float] = {}
    flops = hours = rate = 0.0
    for (variant, rung), members in groups.items():
        first, missing = members[0], [run for run in members if not run.folder.finished]
        config, per_step = first.config, first.flops / first.config.steps
        key = json.dumps([config.model, config.batch.model_dump(), config.execution.model_dump()], sort_keys=True)
        # Each architecture is measured once, and the smaller ones come first.
        reckoned = key not in measured and per_step > _LONGEST_STEP * rate > 0
        if key not in measured and not reckoned:
            measured[key] = measure_step(config)
            rate = per_step / measured[key]
        seconds = per_step / rate if reckoned else measured[key]
        left = len(missing) * config.steps * seconds / 3600
        flops, hours = flops + sum(run.flops for run in missing), hours + left
        total, active = first.architecture.parameter_counts()
        row = [variant, f"L{rung}", str(len(members)), str(len(members) - len(missing))]
        row += [quantity(total), quantity(active), quantity(first.tokens), f"{config.steps:,}", quantity(first.flops)]
        rows.append([*row, f"{'≈' if reckoned else ''}{seconds:.3f}", f"{left:.3f}"])
    total_left = f"still to do: {quantity(flops)} FLOPs, {hours:.2f} hours of training on one worker like this machine"
    return f"{aligned(rows)}\n{total_left}"


def measure_step(config: PretrainConfig) -> float:
    """Median seconds of a few training steps on random tokens, after one to warm up; on this machine."""
    architecture = model_config(config)
    learner = BenchLearner(config, architecture)
    rows, T = config.batch.micro_batch_size, config.batch.context_length
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(config.batch.global_batch_size // rows):
        tokens = torch.randint(architecture.vocab_size, (rows, T + 1), generator=generator)
        positions = torch.arange(T).expand(rows, T)
        batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions}
        batches.append({name: tensor.contiguous().to(learner.device) for name, tensor in batch.items()})
    turns = alternate({"step": lambda: learner.learn(batches)}, rounds=_MEASURED_STEPS)["step"]
    return median(turn.seconds for turn in turns)
