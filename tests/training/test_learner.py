"""A step's losses and gradients, however the global batch is cut into ranks and micro-batches."""

from typing import Any

import pytest
import torch

from mai_thinking.model.latent_moe import balance_loss
from mai_thinking.training.learner import NonFiniteError, TextLoss, routing_metrics
from ranks import run_ranks
from tiny_models import tiny_learner, tiny_model

BALANCE, Z = 0.7, 0.01
Gradients = dict[str, torch.Tensor]


def global_batch(rows: int = 8, length: int = 12) -> dict[str, torch.Tensor]:
    """Rows whose routing differs from one to the next, with uneven numbers of labels."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randint(2, 10 + 10 * row, (length,), generator=generator) for row in range(rows)])
    labels = torch.roll(ids, -1, dims=1)
    for row in range(rows):
        labels[row, :row] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length).expand(rows, length)}


def cut(batch: dict[str, torch.Tensor], pieces: int) -> list[dict[str, torch.Tensor]]:
    chunks = {name: value.chunk(pieces) for name, value in batch.items()}
    return [{name: values[index] for name, values in chunks.items()} for index in range(pieces)]


def one_step(micro_batches: list[dict[str, torch.Tensor]], **execution: Any) -> tuple[dict[str, Any], Gradients]:
    """What an update reports, and the gradients that it handed to the optimiser (not clipped: the norm is high)."""
    learner, gradients = tiny_learner(tiny_model(), balance=BALANCE, z=Z, **execution)
    return learner.update(micro_batches, TextLoss(), 1), gradients


def rank_step(rank: int, world: int, accumulate: int, exact: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    mine = cut(global_batch(), world)[rank]
    result, gradients = one_step(cut(mine, accumulate), activation_checkpointing=exact)
    return result, {name: gradient.numpy() for name, gradient in gradients.items()}


def assert_same(first: tuple[dict[str, Any], Gradients], second: tuple[dict[str, Any], Gradients]) -> None:
    for name in ("loss", "balance_loss", "router_z_loss", "grad_norm"):
        assert first[0][name] == pytest.approx(second[0][name], abs=1e-6, rel=1e-6), name
    assert first[0]["violation"] == pytest.approx(second[0]["violation"])
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_whole_batch_equals_plain_autograd() -> None:
    """Cross-entropy over all labels, GShard's loss and the z-loss, written out from logits."""
    batch = global_batch()
    model = tiny_model().train()
    output = model(batch["input_ids"], output_router_logits=True)
    cross_entropy = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())
    balance = z = torch.zeros(())
    for logits in output.router_logits:
        probabilities = logits.softmax(-1)
        chosen = torch.nn.functional.one_hot(probabilities.topk(3).indices, 12).sum(1).float()
        balance = balance + 12 * (chosen.mean(0) / 3 * probabilities.mean(0)).sum()
        z = z + logits.logsumexp(-1).square().mean()
    (cross_entropy + BALANCE * balance + Z * z).backward()
    result, gradients = one_step([batch])
    assert result["loss"] == pytest.approx(cross_entropy.item(), abs=1e-6)
    assert result["balance_loss"] == pytest.approx(balance.item() / 3, abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("accumulate", "exact"), [(1, False), (2, True)])
def test_two_ranks_equal_one(accumulate: int, exact: bool) -> None:
    """The balance loss too: each rank balances against both ranks' counts."""
    both = run_ranks(2, rank_step, 2, accumulate, exact)
    whole = one_step([global_batch()])
    for result, gradients in both:
        assert_same((result, {name: torch.from_numpy(gradient) for name, gradient in gradients.items()}), whole)


def unequal_step(rank: int, exact: bool) -> dict[str, Any]:
    """Three micro-batches on one rank, one on the other."""
    batch = global_batch()
    pieces = cut(batch | {"token_mask": torch.ones_like(batch["input_ids"], dtype=torch.bool)}, 4)
    learner, _ = tiny_learner(tiny_model(), balance=BALANCE, z=Z, parallel="fsdp", activation_checkpointing=exact)
    return learner.update(pieces[:3] if rank == 0 else pieces[3:], TextLoss(), 1)


@pytest.mark.parametrize("exact", [True, False])
def test_a_rank_of_a_divided_model_with_fewer_micro_batches_keeps_the_others_company(exact: bool) -> None:
    """And what it goes through again for that is not counted."""
    whole = one_step([global_batch()])[0]
    for result in run_ranks(2, unequal_step, exact):
        same = ("loss", "router_z_loss", "grad_norm", "balance_loss") if exact else ("loss", "router_z_loss")
        assert [result[name] for name in same] == pytest.approx([whole[name] for name in same], abs=1e-6, rel=1e-5)
        assert result["violation"] == pytest.approx(whole["violation"])


def test_exact_accumulation_equals_one_batch() -> None:
    whole = one_step([global_batch()])
    for pieces in (2, 4, 8):
        assert_same(one_step(cut(global_batch(), pieces), activation_checkpointing=True), whole)


def test_running_accumulation_balances_against_the_counts_so_far() -> None:
    """Pins what accumulation gives without activation checkpointing: micro-batch i sees the counts of 1 … i."""
    batch, pieces = global_batch(), 4
    model = tiny_model().train()
    token_count = batch["input_ids"].numel()
    label_count = (batch["labels"] != -100).sum()
    counts, total = torch.zeros(3, 12), torch.zeros(())
    for piece in cut(batch, pieces):
        output = model(
            piece["input_ids"], shift_labels=piece["labels"], num_items_in_batch=label_count, output_routing=True
        )
        counts = counts + output.routing.counts_E
        total = total + output.loss + Z * output.routing.z.sum() / token_count
        total = total + BALANCE * balance_loss(counts, output.routing.probabilities_E, token_count)
    total.backward()
    result, gradients = one_step(cut(batch, pieces))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)
    # Only the balance term differs from the whole batch's, and it does differ.
    whole = one_step([batch])[0]
    assert result["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert result["balance_loss"] != pytest.approx(whole["balance_loss"], abs=1e-4)
    assert result["violation"] == pytest.approx(whole["violation"])


def test_checkpointing_does_not_count_twice() -> None:
    plain, checkpointed = one_step([global_batch()]), one_step([global_batch()], activation_checkpointing=True)
    assert_same(plain, checkpointed)


def test_routing_metrics_by_hand() -> None:
    metrics = routing_metrics(torch.tensor([[4.0, 0.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]]), torch.tensor([1.0, 2.0]))
    assert metrics == {"violation": [1.0, 0.0], "violation_max": 1.0, "dead_experts": 1, "router_entropy": 1.5}


def test_non_finite_loss_names_the_step_and_leaves_the_weights() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    learner, _ = tiny_learner(model, learning_rate=1.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(NonFiniteError, match="step 17"):
        learner.update([global_batch()], TextLoss(), 17)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_gradients_are_clipped_to_the_norm() -> None:
    learner, gradients = tiny_learner(tiny_model(), clip_norm=0.01)
    result = learner.update([global_batch()], TextLoss(), 1)
    clipped = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert result["grad_norm"] > 0.01
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)
