"""RMSNorm's own CPU path against the library's in float64."""

import pytest
import torch
import torch.nn.functional as F

from mai_thinking.model.norm import RMSNorm


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 5, 3, 8), (8,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(8, epsilon=1e-2)  # large enough to be seen
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(*shape, 2).to(dtype)[..., 0].requires_grad_()  # not contiguous
    g = torch.randn(shape)
    y = norm(x)
    assert y.dtype == torch.float32
    y.backward(g)

    x_wide, weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    expected = F.rms_norm(x_wide, (8,), weight, 1e-2)
    expected.backward(g.double())
    assert x.grad is not None
    assert x_wide.grad is not None
    assert (y - expected).abs().max() < 1e-5
    torch.testing.assert_close(x.grad, x_wide.grad.to(dtype))
    assert norm.weight.grad is not None
    assert weight.grad is not None
    assert (norm.weight.grad - weight.grad).abs().max() < 1e-5


def test_a_row_of_zeros_has_a_gradient() -> None:
    x = torch.zeros(1, 4, requires_grad=True)
    RMSNorm(4, epsilon=1e-4)(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.full((1, 4), 100.0))
