"""Memory that is used again, and never too early."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mai_thinking.model import MaiThinkingConfig, recycling
from mai_thinking.model.experts import bucketed_experts
from mai_thinking.model.latent_moe import Experts
from mai_thinking.model.recycling import Recycler

LIKE = torch.zeros(1)


def test_shape_and_dtype() -> None:
    memory = Recycler()
    for shape in ((3, 5, 7), (4,), (0, 6), ()):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            made = memory.empty(shape, torch.zeros(1, dtype=dtype))
            assert (made.shape, made.dtype, made.stride()) == (shape, dtype, torch.empty(shape).stride())
            assert made.is_contiguous()
            made.fill_(1.0)


def test_used_again_when_let_go() -> None:
    memory = Recycler()
    first = memory.empty((100, 10), LIKE)
    place = first.data_ptr()
    second = memory.empty((100, 10), LIKE)
    assert second.data_ptr() != place
    del first
    third = memory.empty((99, 10), LIKE)
    assert third.data_ptr() == place
    memory = Recycler()
    large = memory.empty((1000,), LIKE)
    place = large.data_ptr()
    del large
    assert memory.empty((10,), LIKE).data_ptr() != place  # most of it would lie idle
    assert memory.empty((1001,), LIKE).data_ptr() != place


HOLDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda made: made,
    "a view": lambda made: made[50:, 3],
    "detached": lambda made: made.detach(),
    "an array": lambda made: made.numpy(),
    "its storage": lambda made: made.untyped_storage(),
    "a graph": lambda made: (made * torch.ones(10, requires_grad=True)).sum().grad_fn,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
def test_not_while_anything_holds_it(hold: Callable[[torch.Tensor], Any]) -> None:
    memory = Recycler()
    made = memory.empty((100, 10), LIKE)
    place = made.data_ptr()
    holder = hold(made)
    del made
    assert all(memory.empty((100, 10), LIKE).data_ptr() != place for _ in range(3))
    del holder
    assert place in {other.data_ptr() for other in [memory.empty((100, 10), LIKE) for _ in range(3)]}


def test_what_is_not_asked_for_any_more_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycling, "FORGET_AFTER", 8)
    memory = Recycler()
    held = memory.empty((50,), LIKE)
    memory.empty((1000,), LIKE)
    assert len(memory._kept) == 2
    for _ in range(16):
        memory.empty((10,), LIKE)
    assert sorted(block.size for block in memory._kept) == [40, 200]  # `held` is in use
    held.fill_(1.0)


def test_gradients_of_a_step_outlive_the_next() -> None:
    """Kept by an optimiser, a hook, a user, they are not overwritten; let go, they make room."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_experts": 12, "latent_size": 16, "moe_intermediate_size": 20}
    experts = Experts(MaiThinkingConfig(num_experts_per_tok=3, **sizes))
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)

    def gradients() -> list[torch.Tensor]:
        experts.zero_grad(set_to_none=True)
        x = torch.randn(40, 16)
        chosen = torch.rand(40, 12).topk(3).indices
        out = bucketed_experts(experts, x, chosen, torch.rand(40, 3))
        out.backward(torch.randn_like(out))
        return [weight.grad for weight in experts.parameters() if weight.grad is not None]

    first = gradients()
    copies = [gradient.clone() for gradient in first]
    places = {gradient.data_ptr() for gradient in first}
    second = gradients()
    assert all(gradient.equal(copy) for gradient, copy in zip(first, copies, strict=True))
    assert not any(new.equal(old) for new, old in zip(second, first, strict=True))
    del first, second
    gradients()
    assert places & {gradient.data_ptr() for gradient in gradients()}
