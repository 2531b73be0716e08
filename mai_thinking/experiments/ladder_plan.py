"""What a ladder's runs will cost, before they cost anything."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from mai_thinking.config.ladder import LadderConfig, Probe
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.training.context import make_accelerator
from mai_thinking.training.learner import Learner
from mai_thinking.training.model_files import build_model, model_config
from mai_thinking.training.plan import quantity
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.text_loss import TextLoss

_MEASURED_STEPS = 5
_LONGEST_STEP = 10.0
"""Seconds; steps expected to take longer are not tried but reckoned from the FLOPs of a smaller rung."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a ladder."""

    variant: str
    rung: int
    seed: int
    config: PretrainConfig
    total: int
    """Parameters."""
    active: int
    flops: float
    probe: Probe | None = None

    @property
    def name(self) -> str:
        """Also its folder's."""
        return self.config.name

    @property
    def folder(self) -> RunFolder:
        """Where it lives."""
        return RunFolder(self.config.folder)

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.config.steps * self.config.batch.tokens_per_step


def plan_runs(ladder: LadderConfig) -> list[PlannedRun]:
    """All runs, rung by rung and seed by seed, so that whatever is done when a ladder stops can be compared."""
    runs = []
    for rung in sorted(ladder.rungs):
        for seed in ladder.seeds_of(rung):
            for variant in ladder.variants:
                config = ladder.run_config(variant, rung, seed, steps=1)
                architecture = model_config(config)
                total, active = architecture.parameter_counts()
                per_step = config.batch.tokens_per_step
                steps = max(1, round(ladder.tokens_per_active_parameter * active / per_step))
                config = ladder.run_config(variant, rung, seed, steps)
                flops = architecture.flops_per_token(config.batch.context_length) * steps * per_step
                runs.append(PlannedRun(variant.name, rung, seed, config, total, active, flops, variant.probe))
    return runs


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step."""

    seconds: float
    measured: bool
    """False: reckoned from another rung's."""


def time_steps(runs: Sequence[PlannedRun]) -> dict[str, StepTime]:
    """By the run's name, on this machine; each architecture is measured once, and the smaller ones first."""
    known: dict[str, StepTime] = {}
    times: dict[str, StepTime] = {}
    flops_per_second = 0.0
    for run in runs:
        config, flops = run.config, run.flops / run.config.steps
        key = json.dumps([config.model, config.batch.model_dump(), config.execution.model_dump()], sort_keys=True)
        if key not in known:
            if flops > _LONGEST_STEP * flops_per_second > 0:
                known[key] = StepTime(flops / flops_per_second, measured=False)
            else:
                known[key] = StepTime(measure_step(config), measured=True)
                flops_per_second = flops / known[key].seconds
        times[run.name] = known[key]
    return times


def measure_step(config: PretrainConfig) -> float:
    """Median seconds of a few training steps on random tokens, after one to warm up."""
    architecture = model_config(config)
    accelerator = make_accelerator(config)
    learner = Learner(
        build_model(config, architecture),
        config,
        accelerator,
        balance=architecture.router_aux_loss_coef,
        z=architecture.router_z_loss_coef,
    )
    learner.model.train()
    batches = _random_batches(config, architecture, accelerator.device)
    seconds = []
    for number in range(1 + _MEASURED_STEPS):
        begin = time.perf_counter()
        learner.update(batches, TextLoss(), 1 + number)
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])


def _random_batches(
    config: PretrainConfig, architecture: MaiThinkingConfig, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    rows, T = config.batch.micro_batch_size, config.batch.context_length
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(config.batch.global_batch_size // rows):
        tokens = torch.randint(architecture.vocab_size, (rows, T + 1), generator=generator)
        positions = torch.arange(T).expand(rows, T).contiguous()
        batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions}
        batches.append({name: tensor.contiguous().to(device) for name, tensor in batch.items()})
    return batches


def plan_table(runs: Sequence[PlannedRun]) -> str:
    """A line for each config and rung, and the total of what is not yet done."""
    times = time_steps(runs)
    lines = [
        f"{'config':<24}{'rung':>5}{'runs':>5}{'done':>5}{'total':>9}{'active':>9}{'tokens':>9}{'steps':>8}{'FLOPs':>9}"
        f"{'s/step':>9}{'hours':>8}"
    ]
    groups: dict[tuple[str, int], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.variant, run.rung), []).append(run)
    flops = hours = 0.0
    for (variant, rung), members in groups.items():
        first, step = members[0], times[members[0].name]
        missing = [run for run in members if not run.folder.finished]
        group_hours = len(missing) * first.config.steps * step.seconds / 3600
        flops, hours = flops + sum(run.flops for run in missing), hours + group_hours
        lines.append(
            f"{variant:<24}{f'L{rung}':>5}{len(members):>5}{len(members) - len(missing):>5}"
            f"{quantity(first.total):>9}{quantity(first.active):>9}{quantity(first.tokens):>9}{first.config.steps:>8,}"
            f"{quantity(first.flops):>9}{'' if step.measured else '≈'}{step.seconds:>9.3f}{group_hours:>8.3f}"
        )
    lines.append(f"still to do: {quantity(flops)} FLOPs, {hours:.2f} hours of training on one worker like this machine")
    return "\n".join(lines)
