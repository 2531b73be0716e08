"""Experts by grouped products against the definition; and what the router and the loss do for a GPU's sake."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_experts import LOADS, Choose, assert_close, make, results, skewed

from mai_thinking.model import latent_moe
from mai_thinking.model.experts import eager_experts
from mai_thinking.model.grouped_experts import RowOrder, grouped_experts, swiglu_backward
from mai_thinking.model.latent_moe import LatentMoE, rounded_once, stable_top_k
from mai_thinking.model.loss import _loss_and_gradient, chunked_cross_entropy
from mai_thinking.model.router_product import parts, router_product
from tiny_models import tiny_model

Results = list[torch.Tensor]


def grouped(module: Any, *inputs: torch.Tensor) -> torch.Tensor:
    x, chosen, gates = inputs
    return grouped_experts(x, module.gate_up_proj, module.down_proj, gates, chosen)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("choose", "tokens"), LOADS)
def test_against_the_definition(choose: Choose, tokens: int) -> None:
    experts, inputs = make(tokens, choose)
    assert_close(results(grouped, experts, inputs), results(eager_experts, experts, inputs))


def test_compiled_it_is_one_graph() -> None:
    """In bf16, which is what a compiler takes for grouped products."""
    _, (_, chosen, gates, _) = make(60)
    weights = [torch.randn(40, 32, 16), torch.randn(40, 16, 16)]
    inputs = [t.bfloat16().requires_grad_() for t in (torch.randn(60, 16), *weights)]
    dout = torch.randn(60, 16).bfloat16()
    found = []
    for function in (grouped_experts, torch.compile(grouped_experts, backend="aot_eager", fullgraph=True)):
        out = function(*inputs, gates, chosen)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, dout)])
    torch.testing.assert_close(found[1], found[0], atol=0.02, rtol=0.02)


def test_pairs_are_sorted_by_expert_and_then_by_token() -> None:
    chosen = torch.tensor([[3, 1], [1, 0], [3, 0]])
    order = RowOrder.of(chosen, 5)
    assert order.pair_S.tolist() == [3, 5, 1, 2, 0, 4]
    assert order.ends_E.tolist() == [2, 4, 4, 6, 6]
    assert order.pair_S[order.row_TK].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_experts_one_after_another_are_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled way to choose them, on ties too."""
    p = torch.rand(50, 64, generator=torch.Generator().manual_seed(1)).mul(8).floor().div(8)
    expected = stable_top_k(p, 6)
    bits = p.view(torch.int32).long() * 64 + torch.arange(63, -1, -1)
    assert torch.equal(latent_moe._largest_by_turns(bits, 64, 6), expected)
    assert len(set(p.gather(1, expected)[0].tolist())) < 6


def test_the_routers_product_by_parts() -> None:
    torch.manual_seed(0)
    x, weight, d = torch.randn(300, 40), torch.randn(24, 40), torch.randn(300, 24)
    high, middle, low = (part.float() for part in parts(x))
    assert torch.equal(high + middle + low, x)
    assert float(((high - x) / x).abs().max()) > 2**-9
    x, weight = x.requires_grad_(), weight.requires_grad_()
    logits, expected = router_product(x, weight, by_parts=True), F.linear(x.double(), weight.double())
    assert distance(logits, expected) < 4 * distance(F.linear(x, weight), expected) < 1e-6
    got = torch.autograd.grad(logits, (x, weight), d)
    expected = torch.autograd.grad(expected, (x, weight), d.double())
    assert max(map(distance, got, expected)) < 3e-5


def test_the_routings_sums_two_ways() -> None:
    """Real tokens taken out, and others weighed with 0."""
    torch.manual_seed(0)
    logits, real = torch.randn(30, 12), torch.rand(30) < 0.6
    chosen, probabilities = logits.topk(3).indices, logits.softmax(dim=-1)
    expected = latent_moe.summarize(chosen, logits, probabilities, real)
    got = latent_moe._summarize_masked(chosen, logits, probabilities, real.float())
    torch.testing.assert_close(tuple(got), tuple(expected))


def test_the_losss_two_ways() -> None:
    torch.manual_seed(0)
    logits, labels = 4 * torch.randn(20, 50), torch.randint(0, 50, (20,))
    labels[3] = -100
    first = _loss_and_gradient(logits, labels, torch.float32, True, in_place=False)
    second = _loss_and_gradient(logits.clone(), labels, torch.float32, True, in_place=True)
    torch.testing.assert_close(first, second)
    assert _loss_and_gradient(logits, labels, torch.float32, False, in_place=False)[1] is None


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_rounded_once_get_the_same_gradients(compiled: bool) -> None:
    """Over micro-batches of which each has its backward pass; and in fp32, where a sum of bf16 gradients rounds."""
    gradients = []
    for once in (False, True):
        layer = next(
            module for module in tiny_model(moe_intermediate_size=24).modules() if isinstance(module, LatentMoE)
        )
        torch.nn.init.normal_(layer.latent_up.weight)
        forward = torch.compile(layer, backend="aot_eager") if compiled else layer
        with rounded_once(layer, torch.bfloat16) if once else nullcontext():
            for _ in range(3):
                with torch.autocast("cpu", torch.bfloat16):
                    out, *_ = forward(torch.randn(2, 16, layer.config.hidden_size))
                out.square().sum().backward()
        assert layer.experts.copies is None
        gradients.append([weight.grad for weight in (layer.experts.gate_up_proj, layer.experts.down_proj)])
    for alone, rounded in zip(*gradients, strict=True):
        assert alone.dtype == rounded.dtype == torch.float32
        assert alone.abs().max() > 0
        assert torch.equal(alone, rounded)


# --------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_grouped_experts_on_a_gpu(compiled: bool) -> None:
    """Against the definition in fp32, with experts that nobody chooses; and the same bits again."""
    torch.manual_seed(0)
    E, L, inner, K, T = 64, 128, 192, 4, 1000
    weights = [0.1 * torch.randn(E, 2 * inner, L), 0.1 * torch.randn(E, L, inner)]
    x, gates, dout = torch.randn(T, L), torch.rand(T, K).softmax(-1), torch.randn(T, L)
    chosen = (2 * torch.rand(E) + torch.rand(T, E)).topk(K).indices.cuda()
    assert chosen.unique().numel() < E
    given = [t.cuda().requires_grad_() for t in (x, *weights, gates)]
    dout = dout.cuda()

    def run(dtype: torch.dtype) -> Results:
        x, gate_up, down, gates = given
        if dtype == torch.float32:
            out = _definition(x, gate_up, down, gates, chosen)
        else:
            function = torch.compile(grouped_experts) if compiled else grouped_experts
            out = function(x.to(dtype), gate_up, down, gates, chosen)
        return [out.detach(), *torch.autograd.grad(out, given, dout.to(out.dtype))]

    got, again, expected = run(torch.bfloat16), run(torch.bfloat16), run(torch.float32)
    assert max(map(distance, got, expected)) < 1e-2
    assert all(map(torch.equal, got, again))


def _definition(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, gates: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        token, slot = torch.where(chosen == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        out = out.index_add(0, token, F.linear(F.silu(gate) * up, down[expert]) * gates[token, slot, None])
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [96, 256, 768])
def test_the_swiglu_kernel(inner: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(1001, inner).bfloat16(), torch.randn(1001, 2 * inner).bfloat16(), torch.rand(1001)
    got = swiglu_backward(*(t.cuda() for t in inputs))
    assert max(distance(a.cpu(), b) for a, b in zip(got, swiglu_backward(*inputs), strict=True)) < 1e-3


@pytest.mark.gpu
def test_router_and_loss_on_a_gpu() -> None:
    torch.manual_seed(0)
    p = torch.rand(4096, 512, device="cuda").mul(64).floor().div(64)
    assert torch.equal(torch.compile(stable_top_k)(p, 8), stable_top_k(p, 8))
    x, weight = (torch.randn(n, 256, device="cuda").requires_grad_() for n in (3000, 512))
    d = torch.randn(3000, 512, device="cuda")
    logits = torch.compile(lambda x, w: router_product(x, w, by_parts=True))(x, weight)
    exact = F.linear(x.double(), weight.double())
    assert distance(logits, exact) < 2e-6
    expected = torch.autograd.grad(exact, (x, weight), d.double())
    assert max(map(distance, torch.autograd.grad(logits, (x, weight), d), expected)) < 3e-5
    labels = torch.randint(0, 512, (1, 3000), device="cuda")
    labels[0, :7] = -100
    reference = F.cross_entropy(x @ weight.T, labels[0], reduction="sum")
    reference_gradients = torch.autograd.grad(reference, (x, weight))
    for dtype, bound in ((None, 1e-5), (torch.bfloat16, 1e-2)):
        loss = chunked_cross_entropy(x[None], weight, labels, dtype)
        gradients = torch.autograd.grad(loss, (x, weight))
        assert max(map(distance, (loss, *gradients), (reference, *reference_gradients))) < bound


def test_there_is_no_load_that_a_grouped_product_would_not_see() -> None:
    _, (_, chosen, _, _) = make(500, skewed)
    ends = RowOrder.of(chosen, 40).ends_E
    assert torch.equal(ends.diff(prepend=ends.new_zeros(1)).long(), torch.bincount(chosen.flatten(), minlength=40))
