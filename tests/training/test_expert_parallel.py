"""Layouts of ranks: whatever divides experts and shards weights, a step is that of one process. A rank's experts are
cut into groups whose rows travel one behind the other."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_learner import assert_same, cut, global_batch, one_step
from torch import Tensor

from mai_thinking.model import expert_parallel
from mai_thinking.model.configuration import MaiThinkingConfig
from mai_thinking.model.latent_moe import Experts
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


EXPERTS, LATENT, TOP_K = 12, 8, 2
GROUPS = (1, 2, 4, 12)
CHOICES = {
    "all": list(range(EXPERTS)),
    "one_rank_has_none": [0, 1, 2],
    "groups_have_none": [0, 5, 7],
    "one_expert_has_all": [4],
}
"""Experts that tokens may choose. Of 2 ranks the first has those up to 5, of 4 those up to 2."""


def experts_of(first: int, last: int) -> Experts:
    """Those from `first` on, the same on every rank."""
    sizes = {"num_experts": EXPERTS, "latent_size": LATENT, "moe_intermediate_size": 12}
    experts = Experts(MaiThinkingConfig(**sizes, num_experts_per_tok=TOP_K))
    experts.config._experts_implementation = "bucketed_mm"
    draw = torch.Generator().manual_seed(0)
    for name, weight in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(torch.randn(weight.shape, generator=draw)[first:last]))
    return experts


def tokens_of(rank: int, choices: list[int]) -> list[Tensor]:
    """Latents, experts (perhaps one of them twice), gates and the output's gradient; as many tokens more as ranks."""
    draw, tokens = torch.Generator().manual_seed(rank + 1), 5 + rank
    drawn = torch.randint(len(choices), (tokens, TOP_K), generator=draw)
    x, dout = (torch.randn(tokens, LATENT, generator=draw) for _ in range(2))
    return [x, torch.tensor(choices)[drawn], torch.rand(tokens, TOP_K, generator=draw), dout]


def mixed(experts: Experts, x: Tensor, chosen: Tensor, gates: Tensor, dout: Tensor) -> list[Any]:
    """The output and all gradients."""
    x, gates = x.requires_grad_(), gates.requires_grad_()
    out = experts(x, chosen, gates)
    out.backward(dout)
    wanted = (out.detach(), x.grad, gates.grad, experts.gate_up_proj.grad, experts.down_proj.grad)
    return [tensor.numpy() for tensor in wanted if tensor is not None]


def divided(rank: int) -> list[list[Any]]:
    """By number of groups and choices."""
    world = dist.group.WORLD
    assert world is not None
    own = EXPERTS // world.size()
    results = []
    for groups in GROUPS:
        expert_parallel.GROUPS = groups
        exchange = expert_parallel.ExpertExchange(world, EXPERTS, torch.device("cpu"))
        for choices in CHOICES.values():
            experts = experts_of(rank * own, rank * own + own)
            experts.exchange = exchange
            results.append(mixed(experts, *tokens_of(rank, choices)))
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_groups_of_divided_experts_equal_undivided_ones(world: int) -> None:
    """Output and all gradients, where groups are uneven, and where nobody needs the experts of a group or a rank."""
    results = run_ranks(world, divided)
    for (groups, name), *of_ranks in zip(product(GROUPS, CHOICES), *results, strict=True):
        parts = [tokens_of(rank, CHOICES[name]) for rank in range(world)]
        alone = mixed(experts_of(0, EXPERTS), *map(torch.cat, zip(*parts, strict=True)))
        for together, whole in zip(zip(*of_ranks, strict=True), alone, strict=True):
            joined = torch.from_numpy(np.concatenate(together))
            case = f"{groups} groups, {name}"
            torch.testing.assert_close(joined, torch.from_numpy(whole), atol=1e-5, rtol=1e-5, msg=case)
