"""The loss against hand-worked numbers and independently written rivals; what accumulation and ranks may not change."""

import math
import random

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from mai_thinking.config.grpo import ObjectiveSection
from mai_thinking.errors import RunError
from mai_thinking.rl.objective import (
    EntropyController,
    group_advantages,
    grpo_loss,
    objective_metrics,
)
from ranks import run_ranks

REPORT = {"epsilon": 0.6, "clip_relaxation": 0.0, "ratio_min": 0.0, "ratio_max": 50.0}


def one_token(ratio: float, advantage: float, logprob: float = -2.0, **changes: object) -> tuple[float, float, dict]:
    """Loss, gradient by logprob, and metrics of a single token, in double precision."""
    new = torch.tensor([[logprob]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[logprob - math.log(ratio)]], dtype=torch.float64)
    settings = {**REPORT, "token_count": 1, **changes}
    loss, statistics = grpo_loss(new, old, torch.tensor([advantage], dtype=torch.float64), torch.ones(1, 1), **settings)
    loss.backward()
    return loss.item(), new.grad.item(), objective_metrics([statistics])


# ε = 0.6, k = 0: trust region [0.4, 2.5]; outer clip [0.1, 50]. ∂r/∂logprob = r.
CASES = [
    # A, r, loss, gradient
    (+2.0, 1.5, -3.0, -3.0, "inside both: −r·A"),
    (-2.0, 1.5, 3.0, 3.0, "inside both"),
    (+2.0, 4.0, -5.0, 0.0, "gain above the trust region: −2.5·A"),
    (-2.0, 4.0, 8.0, 8.0, "cost above it: PPO leaves it alone, −r·A"),
    (+2.0, 0.25, -0.5, -0.5, "gain below it: PPO leaves it alone"),
    (-2.0, 0.25, 0.8, 0.0, "cost below it: −0.4·A"),
    (+2.0, 80.0, -5.0, 0.0, "gain above both"),
    (-2.0, 80.0, 100.0, 0.0, "cost above the outer clip, which takes hold: −50·A"),
    (+2.0, 0.05, -0.2, 0.0, "gain below the outer clip, which takes hold: −0.1·A"),
    (-2.0, 0.05, 0.8, 0.0, "cost below both"),
]


@pytest.mark.parametrize(("advantage", "ratio", "loss", "gradient", "why"), CASES, ids=[case[-1] for case in CASES])
def test_every_branch_by_hand(advantage, ratio, loss, gradient, why):
    found_loss, found_gradient, metrics = one_token(ratio, advantage, ratio_min=0.1)
    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert found_gradient == pytest.approx(gradient, abs=1e-12)
    assert metrics["clip_fraction"] == float((ratio > 2.5) if advantage > 0 else (ratio < 0.4))
    assert metrics["outer_clip_fraction"] == float(not 0.1 <= ratio <= 50)
    assert metrics["ratio_max"] == pytest.approx(ratio)
    assert metrics["mismatch"] == pytest.approx(abs(math.log(ratio)))


def test_k_moves_the_upper_end_only():
    assert one_token(4.0, 2.0, clip_relaxation=2.0)[:2] == pytest.approx((-8.0, -8.0))  # 4 < 2.5 + 2
    assert one_token(9.0, 2.0, clip_relaxation=2.0)[:2] == pytest.approx((-9.0, 0.0))  # 4.5·A
    assert one_token(0.25, -2.0, clip_relaxation=2.0)[:2] == pytest.approx((0.8, 0.0))  # the lower end is where it was


def test_without_the_outer_clip_a_stale_token_costs_without_bound():
    loss, gradient, metrics = one_token(1e6, -1.0, ratio_max=math.inf)
    assert (loss, gradient) == pytest.approx((1e6, 1e6))
    assert metrics["outer_clip_fraction"] == 0
    assert one_token(1e6, -1.0)[:2] == pytest.approx((50.0, 0.0))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [(2.9, -2.0, 5.8, 5.8, 0), (4.0, -2.0, 6.0, 0.0, 1), (4.0, 2.0, -5.0, 0.0, 0), (0.25, -2.0, 0.8, 0.0, 0)],
)
def test_dual_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    found = one_token(ratio, advantage, ratio_max=math.inf, dual_clip=3.0)
    assert found[:2] == pytest.approx((loss, gradient))
    assert found[2]["outer_clip_fraction"] == clipped


def random_points(count: int, seed: int) -> list[tuple[float, float, float]]:
    """(logprob, old_logprob, advantage), ratios from e⁻⁸ to e⁸."""
    draw = random.Random(seed)
    return [
        (-new, -new - draw.uniform(-8, 8), draw.gauss(0, 1)) for new in (draw.uniform(0.01, 12) for _ in range(count))
    ]


def losses_and_gradients(points: list[tuple[float, float, float]], **settings: object) -> tuple[list, list]:
    """Token by token, each in a row of its own."""
    new, old, advantages = torch.tensor(points, dtype=torch.float64).T
    new = new[:, None].clone().requires_grad_()
    losses = []
    for i in range(len(points)):
        row = slice(i, i + 1)
        losses.append(
            grpo_loss(new[row], old[row, None], advantages[row], torch.ones(1, 1), token_count=1, **settings)[0]
        )
    torch.stack(losses).sum().backward()
    return [loss.item() for loss in losses], new.grad[:, 0].tolist()


def test_equals_two_sided_clipping_with_delta():
    """TRL's `delta` (INTELLECT-2): −min(min(r, δ)·A, clip(r, 1 − ε_low, 1 + ε_high)·A), in plain numbers."""
    low, high, delta = 0.4, 2.5 + 1.25, 50.0
    points = random_points(500, seed=1)
    found = losses_and_gradients(points, **{**REPORT, "clip_relaxation": 1.25})
    seen = set()
    for (new, old, a), loss, gradient in zip(points, *found, strict=True):
        r = math.exp(new - old)
        first, second = min(r, delta) * a, max(low, min(r, high)) * a
        if first <= second:
            expected, slope = -first, -r * a if r < delta else 0.0
        else:
            expected, slope = -second, -r * a if low < r < high else 0.0
        seen.add((first <= second, slope == 0.0, a > 0))
        assert loss == pytest.approx(expected, rel=1e-12)
        assert gradient == pytest.approx(slope, rel=1e-12)
    assert len(seen) == 5  # all that there are: a gain is never held by δ while the trust region is narrower


def test_equals_dual_clip():
    """Ye et al. (2020), equation 5: for A < 0, max(min(r·A, clip(r)·A), c·A)."""
    points = random_points(500, seed=2)
    settings = {**REPORT, "ratio_max": math.inf, "dual_clip": 3.0}
    held = 0
    for (new, old, a), loss, gradient in zip(points, *losses_and_gradients(points, **settings), strict=True):
        r = math.exp(new - old)
        objective, slope = r * a, r * a
        if a >= 0 and r > 2.5:
            objective, slope = 2.5 * a, 0.0
        elif a < 0 and r < 0.4:
            objective, slope = 0.4 * a, 0.0
        elif a < 0 and r > 3.0:
            objective, slope, held = 3.0 * a, 0.0, held + 1
        assert loss == pytest.approx(-objective, rel=1e-12)
        assert gradient == pytest.approx(-slope, rel=1e-12)
    assert held > 50


def test_entropy_and_its_bonus_follow_the_true_entropy():
    """With every token of a distribution once, weighted by the old policy through repetition, Ĥ is the entropy of the
    new one and the bonus' gradient is that of the entropy itself."""
    old_p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    sampled = torch.tensor([0] * 4 + [1] * 2 + [2, 3])  # eight draws with just these frequencies
    logits = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1)
    truth = -(logprobs.exp() * logprobs).sum()
    (expected,) = torch.autograd.grad(truth, logits, retain_graph=True)
    settings = {**REPORT, "token_count": 8, "entropy_bonus": 0.1}
    mask = torch.ones(1, 8)
    loss, statistics = grpo_loss(logprobs[sampled][None], old_p.log()[sampled][None], torch.zeros(1), mask, **settings)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert objective_metrics([statistics])["entropy"] == pytest.approx(truth.item(), rel=1e-12)
    assert loss.item() == pytest.approx(-0.1 * truth.item(), rel=1e-12)
    torch.testing.assert_close(gradient, -0.1 * expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio_max", [50.0, math.inf])
@pytest.mark.parametrize("bonus", [0.0, 0.1])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extremes_stay_finite(dtype, ratio_max, bonus, advantage):
    new = torch.tensor([[-0.1, -math.inf, -90.0, -0.5]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[-1e4, -1.0, -0.1, -0.5]], dtype=dtype)
    settings = {**REPORT, "ratio_max": ratio_max, "entropy_bonus": bonus}
    loss, statistics = grpo_loss(new, old, torch.tensor([advantage]), torch.ones(1, 4), token_count=4, **settings)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(new.grad).all()
    assert new.grad[0, 1] == 0
    assert new.grad[0, 3].item() == pytest.approx(-(advantage + bonus * (0.5 - 1)) / 4, abs=2e-3)
    assert math.isfinite(objective_metrics([statistics])["entropy"])


def test_garbage_outside_the_mask_does_not_matter():
    torch.manual_seed(0)
    new, old = -torch.rand(3, 6), -torch.rand(3, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1], [0] * 6])
    advantages = torch.tensor([1.0, -0.5, 0.0])
    results = []
    for garbage in (0.0, math.nan, math.inf, -math.inf, 1e30):
        dirty_new = torch.where(mask != 0, new, garbage).requires_grad_()
        dirty_old, dirty_gain = torch.where(mask != 0, old, garbage), advantages.clone()
        dirty_gain[2] = garbage  # a row of padding alone
        loss, statistics = grpo_loss(dirty_new, dirty_old, dirty_gain, mask, token_count=8, entropy_bonus=0.1, **REPORT)
        loss.backward()
        results.append((loss.item(), dirty_new.grad, objective_metrics([statistics])))
        assert torch.equal(dirty_new.grad[mask == 0], torch.zeros(10))
    for loss, gradient, metrics in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(gradient, results[0][1])
        assert metrics == results[0][2]


def test_a_nan_under_the_mask_is_not_hidden():
    loss, _ = grpo_loss(
        torch.tensor([[-1.0, math.nan]]), -torch.ones(1, 2), torch.ones(1), torch.ones(1, 2), token_count=2, **REPORT
    )
    assert math.isnan(loss)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 4)])
def test_a_micro_batch_without_responses_counts_for_nothing(shape):
    new = torch.full(shape, -1.0, requires_grad=True)
    loss, statistics = grpo_loss(
        new, -torch.ones(shape), torch.ones(shape[0]), torch.zeros(shape), token_count=5, **REPORT
    )
    loss.backward()
    assert loss == 0
    assert not new.grad.any()
    assert set(objective_metrics([statistics]).values()) == {0.0}


def test_shapes_that_would_broadcast_are_refused():
    new = -torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3\), old_logprobs \(2, 1\)"):
        grpo_loss(new, new[:, :1], torch.ones(2), torch.ones(2, 3), token_count=6, **REPORT)
    with pytest.raises(ValueError, match=r"advantages \(3,\) must be \[B\]"):
        grpo_loss(new, new, torch.ones(3), torch.ones(2, 3), token_count=6, **REPORT)


# --- The global batch: 8 responses of unlike lengths, through a small policy. ---


def batch() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    features, tokens = torch.randn(8, 12, 5), torch.randint(0, 7, (8, 12))
    lengths = torch.tensor([12, 3, 1, 7, 12, 2, 5, 9])
    mask = torch.arange(12) < lengths[:, None]
    old = -torch.rand(8, 12) * 4
    return features, tokens, old, torch.randn(8), mask


def gradient_of(pieces: list[slice], ranks: int = 1) -> tuple[torch.Tensor, dict[str, float]]:
    """The policy's gradient, accumulated over `pieces` of the batch, times `ranks`, and the metrics over all ranks."""
    # In float64: the loss is a small sum of large terms, and in fp32 its last digits hang on the processor.
    features, tokens, old, advantages, mask = (part.double() if part.is_floating_point() else part for part in batch())
    torch.manual_seed(2)
    policy = torch.nn.Linear(5, 7).double()
    token_count, parts = mask.sum(), []
    for piece in pieces:
        logprobs = policy(features[piece]).log_softmax(-1).gather(-1, tokens[piece][..., None])[..., 0]
        given = old[piece], advantages[piece], mask[piece]
        loss, statistics = grpo_loss(logprobs, *given, token_count=token_count, entropy_bonus=0.01, **REPORT)
        (loss * ranks).backward()
        parts.append(statistics)
    return policy.weight.grad, objective_metrics(parts)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_changes_nothing(accumulation):
    whole, metrics = gradient_of([slice(0, 8)])
    size = 8 // accumulation
    cut, cut_metrics = gradient_of([slice(at, at + size) for at in range(0, 8, size)])
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-6)
    assert whole.abs().max() > 0.01
    assert cut_metrics == pytest.approx(metrics, rel=1e-6)
    assert 0 < metrics["clip_fraction"] < 1


def _rank(rank: int) -> tuple[list, dict[str, float]]:
    # Unequal shares: the mean of the ranks' own means would be another number.
    pieces = [slice(0, 2)] if rank == 0 else [slice(2, 5), slice(5, 8)]
    gradient, metrics = gradient_of(pieces, ranks=2)
    dist.all_reduce(gradient)
    return (gradient / 2).tolist(), metrics  # as DDP averages


def test_two_workers_are_as_one():
    whole, metrics = gradient_of([slice(0, 8)])
    for gradient, of_rank in run_ranks(2, _rank):
        torch.testing.assert_close(torch.tensor(gradient, dtype=whole.dtype), whole, rtol=0, atol=1e-6)
        assert of_rank == pytest.approx(metrics, rel=1e-6)


def test_advantages_by_token_are_those_by_row_spread_out():
    _, _, old, advantages, mask = batch()
    by_row, _ = grpo_loss(old + 0.1, old, advantages, mask, token_count=51, **REPORT)
    by_token, _ = grpo_loss(old + 0.1, old, advantages[:, None].expand(8, 12), mask, token_count=51, **REPORT)
    assert by_row == by_token


def test_group_advantages():
    assert group_advantages([0, 0, 1, 1]) == [-1, -1, 1, 1]
    assert group_advantages([1, 0, 0, 0]) == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert group_advantages([0.7, 0.7, 0.7]) == [0, 0, 0]
    assert group_advantages([0.1 + 0.2, 0.3]) == [0, 0]  # they differ by rounding
    assert group_advantages([3.0]) == [0]
    assert group_advantages([]) == []
    draw = random.Random(0)
    rewards = [draw.uniform(-1, 2) for _ in range(128)]
    advantages = group_advantages(rewards)
    assert sum(advantages) == pytest.approx(0, abs=1e-9)
    assert sum(a * a for a in advantages) / 128 == pytest.approx(1)
    assert group_advantages([1e6 * r + 5 for r in rewards]) == pytest.approx(advantages)
    with pytest.raises(ValueError, match="not finite"):
        group_advantages([1.0, math.nan])


def test_controller_walks_to_its_ends_and_rests_on_target():
    controller = EntropyController(0.3, 0.25, 2.5)
    assert [controller.update(0.1) for _ in range(3)] == [0.25, 0.5, 0.75]
    assert controller.update(0.3) == 0.75
    assert [controller.update(0.1) for _ in range(9)][-3:] == [2.5, 2.5, 2.5]
    assert controller.update(0.31) == 2.25
    resumed = EntropyController(0.3, 0.25, 2.5)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.update(0.31) == 2.0
    assert [controller.update(math.inf) for _ in range(12)][-2:] == [0, 0]
    with pytest.raises(RunError, match="not a number"):
        controller.update(math.nan)


@pytest.mark.parametrize(
    ("changes", "relaxations", "range_", "bonus"),
    [
        ({}, [0.25, 0.5], (0, 50), 0.0),
        ({"entropy_control": "fixed", "clip_relaxation": 2.5}, [2.5, 2.5], (0, 50), 0.0),
        ({"entropy_control": "bonus", "entropy_bonus": 0.02}, [0, 0], (0, 50), 0.02),
        ({"outer_clip": False}, [0.25, 0.5], (0, math.inf), 0.0),
        ({"outer_clip": False, "dual_clip": 3.0}, [0.25, 0.5], (0, math.inf), 0.0),
    ],
    ids=["report", "fixed k", "bonus", "no outer clip", "dual clip"],
)
def test_the_objective_that_a_config_asks_for(changes, relaxations, range_, bonus):
    section = ObjectiveSection(**changes)
    assert section.loss_settings == {
        "epsilon": 0.6,
        "ratio_min": range_[0],
        "ratio_max": range_[1],
        "dual_clip": section.dual_clip,
        "entropy_bonus": bonus,
    }
    controller = EntropyController(
        section.target_entropy, section.step_size, section.max_relaxation, initial=section.clip_relaxation
    )
    assert [controller.update(0.1) for _ in relaxations] == relaxations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_relaxation": 3}, "clip_relaxation: 3.0 is more than max_relaxation 2.5"),
        ({"ratio_max": 0.5}, "must contain 1"),
        ({"epsilon": 1}, "less than or equal to 0.999"),
        ({"entropy_control": "adaptiv"}, "adaptive"),
    ],
)
def test_settings_without_sense_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        ObjectiveSection(**changes)
