"""Layouts of ranks: whatever divides experts and shards weights, a step is that of one process."""

from typing import Any

import pytest
import torch
from test_learner import assert_same, cut, global_batch, one_step

from ranks import run_ranks

LAYOUTS = {
    "fsdp": {"parallel": "fsdp"},
    "expert_parallel": {"expert_parallel": 2},
    "expert_parallel_fsdp": {"parallel": "fsdp", "expert_parallel": 2},
}


def rank_step(rank: int, world: int, pieces: int, execution: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    mine = cut(global_batch(), world)[rank]
    result, gradients = one_step(cut(mine, pieces), **execution)
    return result, {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_equal_one_process(layout: str, world: int) -> None:
    whole = one_step([global_batch()])
    for exact in (False, True):
        execution = LAYOUTS[layout] | {"activation_checkpointing": exact}
        for result, gradients in run_ranks(world, rank_step, world, 2 if exact else 1, execution):
            assert_same((result, {name: torch.from_numpy(gradient) for name, gradient in gradients.items()}), whole)
