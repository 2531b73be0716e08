"""Muon against PyTorch's own, and what it is for: which parameters it takes, and that all ranks agree."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mai_thinking.config.run import OptimizerSection
from mai_thinking.errors import UsageError
from mai_thinking.training.learner import Learner, TextLoss, build_optimizer
from mai_thinking.training.muon import MuonAdamW, orthogonalized
from mai_thinking.training.state import read_tree, write_tree
from ranks import run_ranks
from tiny_models import tiny_learner, tiny_model

RATE = 1e-2


@pytest.mark.parametrize("shape", [(24, 24), (3, 40, 16), (16, 40)])
def test_singular_values_come_near_to_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    """Against the polar factor U·Vᵀ of a singular value decomposition."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(matrices)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    within = u.mT @ found @ vt.mT  # diagonal, if the directions are the same
    values = within.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.5
    assert values.max() < 1.3
    torch.testing.assert_close(within, torch.diag_embed(values), atol=1e-4, rtol=0)
    assert not orthogonalized(torch.zeros(shape)).any()


def test_steps_are_those_of_pytorchs_muon() -> None:
    """Which iterates in bf16, so that it is near and not the same; AdamW's groups are untouched by it."""
    generator = torch.Generator().manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((24, 16), (24, 16), (16, 24), (16,))]
    theirs = copy.deepcopy(ours)
    groups = [{"params": ours[:3], "muon": True}, {"params": ours[3:], "muon": False}]
    mine = MuonAdamW(groups, lr=0.1, weight_decay=0.2)
    muon = torch.optim.Muon(theirs[:3], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[3:], lr=0.1, weight_decay=0.2)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in (mine, muon, adamw):
            optimizer.step()
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert (a - b).norm() / b.norm() < 5e-3
    assert torch.equal(ours[3], theirs[3])


def test_it_takes_matrices_and_leaves_embeddings_routers_experts_and_norms() -> None:
    model = tiny_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerSection(name="muon"))
    taken = {names[id(p)] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    kinds = {name.split(".")[-2] for name in taken}
    attention, dense = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert kinds == attention | dense | {"latent_down", "latent_up"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert not any(group["muon"] for group in build_optimizer(model, OptimizerSection()).param_groups)


def batch(step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 97, (4, 12), generator=torch.Generator().manual_seed(step))[rows]
    return {"input_ids": ids, "labels": ids.roll(-1, dims=1), "position_ids": torch.arange(12).expand(len(ids), 12)}


def muon_learner(seed: int = 0, **execution: Any) -> Learner:
    return tiny_learner(tiny_model(seed), learning_rate=RATE, optimizer="muon", **execution)[0]


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    learner = muon_learner()
    for step in (1, 2):
        learner.update([batch(step)], TextLoss(), step)
    write_tree(tmp_path / "state", {name: part.state_dict() for name, part in learner.state().items()})
    resumed = muon_learner(seed=1)
    saved = read_tree(tmp_path / "state")
    for name, part in resumed.state().items():
        part.load_state_dict(saved[name])
    for each in (learner, resumed):
        each.update([batch(3)], TextLoss(), 3)
    for ours, theirs in zip(learner.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def weights_after_a_step(rank: int = 0, world: int = 1) -> dict[str, Any]:
    learner = muon_learner()
    learner.update([batch(1, slice(rank * 4 // world, (rank + 1) * 4 // world))], TextLoss(), 1)
    return {name: value.detach().numpy() for name, value in learner.unwrap().named_parameters()}


def test_two_ranks_take_one_processs_step() -> None:
    first, second = run_ranks(2, weights_after_a_step, 2)
    before = dict(tiny_model().named_parameters())
    for name, value in weights_after_a_step().items():
        assert (first[name] == second[name]).all(), name
        torch.testing.assert_close(torch.from_numpy(first[name]), torch.from_numpy(value), atol=1e-4, rtol=0, msg=name)
        assert not torch.equal(before[name], torch.from_numpy(value)), name


def shard(rank: int) -> str:
    try:
        muon_learner(parallel="fsdp")
    except UsageError as error:
        return str(error)
    return ""


def test_divided_matrices_are_refused() -> None:
    assert all("execution.parallel=ddp" in told for told in run_ranks(2, shard))
