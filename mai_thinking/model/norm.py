"""RMSNorm in fp32, whatever the dtype around it (MAI-Thinking-1 report §2.6.2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """x / rms(x) · gain over the last dimension; input of any dtype, output fp32. Gains start at `initial_gain`."""

    def __init__(self, size: int, epsilon: float, initial_gain: float = 1.0) -> None:
        super().__init__()
        self.initial_gain = initial_gain
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        x, weight = x.float(), self.weight.float()
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNormOnCPU.apply(x, weight, self.epsilon)
        return F.rms_norm(x, (x.size(-1),), weight, self.epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, epsilon={self.epsilon}"


class _RMSNormOnCPU(torch.autograd.Function):
    """The same with its backward written out: on a CPU the library's is a row of small operations, and autograd
    differentiates each of them. With n = x / rms(x): dx = (g · gain − n · mean(g · gain · n)) / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_d: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.size(-1)).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_d, inverse)
        return torch.mul(x, inverse).mul_(weight_d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_d, inverse = ctx.saved_tensors
        n = x * inverse
        gn = g * n
        mean = (gn @ weight_d).div_(x.size(-1)).unsqueeze(-1)
        dx = (g * weight_d).addcmul_(n, mean, value=-1.0).mul_(inverse)
        return dx, gn.reshape(-1, weight_d.size(0)).sum(dim=0), None
