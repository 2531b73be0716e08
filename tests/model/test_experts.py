"""Each way to compute the experts against the definition, one expert after another."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model import experts as experts_module
from mai_thinking.model.experts import bucket_layout, bucketed_experts, eager_experts
from mai_thinking.model.latent_moe import Experts

E, K, L, F = 40, 4, 12, 20
Choose = Callable[[int], torch.Tensor]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def spread(tokens: int) -> torch.Tensor:
    """Each token its own K experts, drawn evenly."""
    return torch.rand(tokens, E, generator=generator()).topk(K).indices


def skewed(tokens: int) -> torch.Tensor:
    """Popular experts with several times the mean load, as early in training, and some that nobody chooses."""
    popularity = torch.linspace(1.0, -1.0, E)[torch.randperm(E, generator=generator())]
    return (popularity + torch.rand(tokens, E, generator=generator())).topk(K).indices


def crowded(tokens: int) -> torch.Tensor:
    """All tokens the same K experts."""
    return torch.tensor([31, 2, 17, 3]).expand(tokens, K).clone()


LOADS = [
    (spread, 1),
    (spread, 2),
    (spread, 9),
    (spread, 300),
    (skewed, 64),
    (skewed, 500),
    (crowded, 1),
    (crowded, 130),
]


def make(
    tokens: int, choose: Choose = spread, dtype: torch.dtype = torch.float32
) -> tuple[Experts, list[torch.Tensor]]:
    """Experts and their inputs: latents, choices, gates; and a gradient for the output."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"num_experts": E, "latent_size": L, "moe_intermediate_size": F}
    experts = Experts(MaiThinkingConfig(num_experts_per_tok=K, **sizes)).to(dtype)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    gates = torch.rand(tokens, K, dtype=dtype).softmax(-1)
    return experts, [torch.randn(tokens, L, dtype=dtype), choose(tokens), gates, torch.randn(tokens, L, dtype=dtype)]


def results(implementation: Callable, experts: Experts, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output and every gradient."""
    x, chosen, gates, dout = inputs
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    experts.zero_grad()
    out = implementation(experts, x, chosen, gates)
    out.backward(dout)
    weights = {name: weight.grad for name, weight in experts.named_parameters() if weight.grad is not None}
    return {"out": out.detach(), "x": x.grad, "gates": gates.grad} | weights  # type: ignore[dict-item]


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert (got[name] - value).abs().max() <= tolerance * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("implementation", ["bucketed_mm", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("choose", "tokens"), LOADS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_equals_the_definition(implementation: str, choose: Choose, tokens: int) -> None:
    experts, inputs = make(tokens, choose)
    expected = results(eager_experts, experts, inputs)
    assert_close(results(ALL_EXPERTS_FUNCTIONS[implementation], experts, inputs), expected)
    with torch.no_grad():
        out = ALL_EXPERTS_FUNCTIONS[implementation](experts, *inputs[:3])
    assert (out - expected["out"]).abs().max() < 1e-5


@pytest.mark.parametrize(("cache", "few", "like"), [(0, 1, 1.0), (0, 99, 0.0), (2**12, 2, 0.8), (2**30, 99, 0.0)])
def test_any_cut_into_buckets_gives_the_same(
    cache: int, few: int, like: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one expert a bucket to one bucket for all, whose padding is then most of it."""
    experts, inputs = make(500, skewed)
    expected = results(eager_experts, experts, inputs)
    for name, value in {"CACHE_BYTES": cache, "FEW_EXPERTS": few, "LIKE_LOAD": like}.items():
        monkeypatch.setattr(experts_module, name, value)
    buckets = bucket_layout(inputs[1], experts.gate_up_proj).buckets
    assert len(buckets) == 1 if cache == 2**30 else len(buckets) > 5
    assert_close(results(bucketed_experts, experts, inputs), expected)


def test_buckets_are_of_like_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the first few, an expert joins the bucket exactly if its load is near enough to the busiest one's."""
    monkeypatch.setattr(experts_module, "CACHE_BYTES", 2**30)
    monkeypatch.setattr(experts_module, "FEW_EXPERTS", 3)
    experts, (_, chosen, *_) = make(500, skewed)
    loads = chosen.flatten().bincount(minlength=E)
    buckets = bucket_layout(chosen, experts.gate_up_proj).buckets
    assert len(buckets) > 3
    for bucket, following in pairwise(buckets):
        loads_n = loads[bucket.experts_n]
        assert bucket.room == loads_n[0] == loads_n.max()
        assert (loads_n[3:] >= 0.8 * bucket.room).all()
        assert following.room < 0.8 * bucket.room


@pytest.mark.parametrize("experts_in_cache", [0.5, 5, 1000])
@pytest.mark.parametrize("pairs_per_expert", [0.0, float("inf")])
@pytest.mark.parametrize("choose", [spread, crowded])
def test_decoding_pair_by_pair_and_by_bucket(
    choose: Choose, pairs_per_expert: float, experts_in_cache: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pair by pair at once, some at a time and a rest, or one by one where the cache does not hold an expert."""
    experts, (x, chosen, gates, _) = make(9, choose)
    monkeypatch.setattr(experts_module, "PAIRS_PER_EXPERT", pairs_per_expert)
    monkeypatch.setattr(experts_module, "CACHE_BYTES", int(experts_in_cache * experts.gate_up_proj[0].nbytes))
    with torch.no_grad():
        expected = eager_experts(experts, x, chosen, gates)
        assert (bucketed_experts(experts, x, chosen, gates) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("choose", "tokens"), LOADS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_plan_drops_no_pair(choose: Choose, tokens: int) -> None:
    experts, (_, chosen, *_) = make(tokens, choose)
    layout = bucket_layout(chosen, experts.gate_up_proj)
    rows = layout.row_TK.flatten()
    assert rows.unique().numel() == chosen.numel()
    assert layout.pair_P[rows].equal(torch.arange(chosen.numel()))
    assert (layout.pair_P == chosen.numel()).sum() == layout.pair_P.numel() - chosen.numel()  # the rest is padding
    expert_P = torch.cat([bucket.experts_n.repeat_interleave(bucket.room) for bucket in layout.buckets])
    assert expert_P[rows].equal(chosen.flatten())
    working = torch.cat([bucket.experts_n for bucket in layout.buckets])
    assert torch.cat((working, layout.idle)).sort().values.equal(torch.arange(E))
    assert working.sort().values.equal(chosen.unique())


@pytest.mark.parametrize("tokens", [1, 7])
def test_gradients_against_finite_differences(tokens: int) -> None:
    experts, (x, chosen, gates, _) = make(tokens, dtype=torch.float64)

    def run(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return bucketed_experts(SimpleNamespace(gate_up_proj=gate_up, down_proj=down, act_fn=silu), x, chosen, gates)

    inputs = [t.detach().clone().requires_grad_() for t in (x, experts.gate_up_proj, experts.down_proj, gates)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_no_tokens() -> None:
    experts, inputs = make(0)
    got = results(bucketed_experts, experts, inputs)
    assert got["out"].shape == (0, L)
    assert all(float(value.abs().sum()) == 0 for value in got.values())
    with torch.no_grad():
        assert bucketed_experts(experts, *inputs[:3]).shape == (0, L)


def test_idle_experts_get_exactly_zero() -> None:
    """Beside memory that is full of NaN: no gradient may come from an uninitialised buffer."""
    experts, inputs = make(130, crowded)
    for _ in range(3):
        junk = [torch.full((size,), torch.nan) for size in (E * 2 * F * L, E * F * L, 130 * K * 2 * F, 4096)]
        del junk
        got = results(bucketed_experts, experts, inputs)
        idle = [expert for expert in range(E) if expert not in inputs[1]]
        for name in ("gate_up_proj", "down_proj"):
            assert (got[name][idle] == 0).all()
            assert (got[name][inputs[1][0]] != 0).any()
        assert all(value.isfinite().all() for value in got.values())


def test_same_inputs_same_bits() -> None:
    experts, inputs = make(500, skewed)
    first = results(bucketed_experts, experts, inputs)
    for _ in range(5):
        again = results(bucketed_experts, experts, inputs)
        assert all(again[name].equal(value) for name, value in first.items())


def test_autocast_computes_in_bf16_and_combines_in_fp32() -> None:
    experts, inputs = make(300, skewed)
    expected = results(eager_experts, experts, inputs)

    def autocast(*arguments: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return bucketed_experts(*arguments)

    x, chosen, gates, dout = inputs
    got = results(autocast, experts, [x, chosen, gates, dout.bfloat16()])
    assert got["out"].dtype == torch.bfloat16
    assert got["gates"].dtype == got["gate_up_proj"].dtype == torch.float32
    for name, value in expected.items():
        assert (got[name] - value).norm() < 0.02 * value.norm(), name
    # These gates differ only in bits that bf16 has not.
    gates = torch.tensor([[1 + 2**-10, -1.0, 0.0, 0.0]]).expand(300, K)
    same = chosen[:, :1].expand(300, K)
    with torch.no_grad():
        difference = autocast(experts, x, same, gates)
        output = autocast(experts, x, same, torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(300, K))
    assert difference.equal(output * 2**-10)


def test_backward_inside_autocast_is_the_same() -> None:
    experts, inputs = make(300, skewed)
    expected = results(bucketed_experts, experts, inputs)
    x, chosen, gates, dout = inputs
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    experts.zero_grad()
    out = bucketed_experts(experts, x, chosen, gates)
    with torch.autocast("cpu", torch.bfloat16):
        out.backward(dout)
    assert gates.grad is not None
    assert gates.grad.equal(expected["gates"])
    assert experts.down_proj.grad is not None
    assert experts.down_proj.grad.equal(expected["down_proj"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_in_the_backward(reentrant: bool) -> None:
    experts, inputs = make(300, skewed)
    expected = results(bucketed_experts, experts, inputs)

    def recomputed(*arguments: torch.Tensor) -> torch.Tensor:
        return checkpoint(bucketed_experts, *arguments, use_reentrant=reentrant)

    got = results(recomputed, experts, inputs)
    assert all(got[name].equal(value) for name, value in expected.items())


def test_frozen_weights_get_no_gradient_and_change_no_other() -> None:
    experts, inputs = make(300, skewed)
    expected = results(bucketed_experts, experts, inputs)
    frozen = results(bucketed_experts, experts.requires_grad_(False), inputs)
    assert frozen.keys() == {"out", "x", "gates"}
    assert all(value.equal(expected[name]) for name, value in frozen.items())


def test_a_tokens_output_does_not_depend_on_the_batch() -> None:
    experts, (x, chosen, gates, _) = make(300, skewed)
    with torch.no_grad():
        together = bucketed_experts(experts, x, chosen, gates)
        alone = torch.cat(
            [bucketed_experts(experts, x[t : t + 1], chosen[t : t + 1], gates[t : t + 1]) for t in range(40)]
        )
        other = x.clone()
        other[40:] = torch.nan
        beside_nan = bucketed_experts(experts, other, chosen, gates)
    assert (together[:40] - alone).abs().max() < 1e-5
    assert beside_nan[:40].equal(together[:40])
