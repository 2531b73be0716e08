"""Every collective of every loop gets its tensors from the device that its group is for: what NCCL would refuse."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState

from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.recipes.distill import self_distill
from mai_thinking.recipes.grpo import grpo
from mai_thinking.recipes.pretrain import pretrain
from placement import Placement
from ranks import run_ranks

CONFIGS = Path(__file__).parents[2] / "configs"
LOOPS: dict[str, Callable[[Any], int]] = {"pretrain": pretrain, "grpo": grpo, "distill": self_distill}


def watched(rank: int, loop: str, config: Any) -> int:
    """How many tensors of collectives lay where they should."""
    os.environ.update(LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    PartialState(cpu=True).device = Placement.DEVICE
    with Placement() as placement:
        assert LOOPS[loop](config) == 0
    return placement.checked


@pytest.fixture(scope="module")
def climbed(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    run = tmp_path_factory.mktemp("climbed") / "run"
    places = [f"output_dir={run}", f"init_from={tiny_run / 'final'}", "steps=2", "evaluation.problems=2"]
    return run, run_ranks(2, watched, "grpo", load_config(GrpoConfig, CONFIGS / "tiny-grpo.yaml", places))


# The layouts of divided models take as long again, each.
@pytest.mark.parametrize(
    "layout",
    [
        "execution.parallel=ddp",
        pytest.param("execution.parallel=fsdp", marks=pytest.mark.slow),
        pytest.param("execution.expert_parallel=2", marks=pytest.mark.slow),
    ],
)
def test_collectives_of_pre_training(tiny_config: Callable[..., Any], tmp_path: Path, layout: str) -> None:
    few = [
        "steps=2",
        "schedule.warmup_steps=1",
        "evaluation.every=1",
        "checkpoint.every=1",
        "evaluation.sample_prompts=[]",
    ]
    assert min(run_ranks(2, watched, "pretrain", tiny_config(tmp_path / "run", *few, layout))) >= 10


def test_collectives_of_reinforcement_learning(climbed: tuple[Path, list[int]]) -> None:
    assert min(climbed[1]) >= 10


def test_collectives_of_distillation(climbed: tuple[Path, list[int]], tiny_run: Path, tmp_path: Path) -> None:
    places = [f"output_dir={tmp_path / 'run'}", f"init_from={tiny_run / 'final'}", "steps=2"]
    config = load_config(DistillConfig, CONFIGS / "tiny-distill.yaml", [*places, f"traces.0.run={climbed[0]}"])
    assert min(run_ranks(2, watched, "distill", config)) >= 10


def misplaced(rank: int) -> list[str]:
    device, found = Placement.DEVICE, []
    with Placement():
        weight = torch.nn.Linear(2, 2).to(device).weight
        host, here = torch.ones(2), torch.ones(2, device=device)
        gloo = dist.new_group(backend="gloo")
        wrong = [(t, None) for t in (host, here.cpu(), host * 2, torch.zeros(2, device=host.device))] + [(here, gloo)]
        right = [(t, None) for t in (here, here * host, weight.detach().sum(), torch.zeros(2, device=here.device))]
        for tensor, group in [*wrong, *right, (host, gloo)]:
            try:
                dist.all_reduce(tensor, group=group)
                found.append("right")
            except AssertionError:
                found.append("wrong")
    return found


def test_what_is_misplaced_is_found() -> None:
    assert run_ranks(2, misplaced) == [["wrong"] * 5 + ["right"] * 5] * 2
