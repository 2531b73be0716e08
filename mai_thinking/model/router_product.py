"""The router's product: fp32 whatever is around it (MAI-Thinking-1 report §2.1), and what that costs on a GPU.

A GPU's matrix units have no fp32: its fp32 product takes some fifteen times as long as one of bf16, and the router's
two gradients would be a good part of a step. They are made of bf16 parts instead: a number is the sum of its first eight
bits and the next eight, so 16 of its 24 bits are kept, and their products are summed in fp32. The forward product, which
decides where tokens go, is in fp32 throughout.
"""

from typing import Any

import torch
import torch.nn.functional as F


def router_product(x_TD: torch.Tensor, weight_ED: torch.Tensor, *, split_gradients: bool) -> torch.Tensor:
    """x · weightᵀ in fp32: [T, D], [E, D] → [T, E]. `split_gradients` makes the gradients of bf16 parts, on a GPU."""
    if split_gradients:
        logits_TE: torch.Tensor = _RouterProduct.apply(x_TD, weight_ED)
        return logits_TE
    return F.linear(x_TD, weight_ED)


class _RouterProduct(torch.autograd.Function):
    """The product, with its gradients of bf16 parts."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD, weight_ED)

    @staticmethod
    def backward(ctx: Any, d_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        E, D = weight_ED.shape
        (d_high, d_low), (w_high, w_low), (x_high, x_low) = parts(d_TE), parts(weight_ED), parts(x_TD)
        # What is left out, low times low, is below the last bit that is kept.
        dx_TD = _product(torch.cat((d_high, d_low, d_high), dim=1), torch.cat((w_high, w_high, w_low)))
        crossed = _product(torch.cat((d_high, d_low), dim=1).mT, torch.cat((x_high, x_low), dim=1))
        return dx_TD, crossed[:E, :D] + crossed[E:, :D] + crossed[:E, D:]


def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bf16 tensors whose sum is fp32 `x` but for a 2⁻¹⁶th."""
    # Cut off, not rounded: a compiler takes a number's way to bf16 and back for nothing, and the rest would be 0.
    high = (x.view(torch.int32) & -65536).view(torch.float32)
    return high.to(torch.bfloat16), (x - high).to(torch.bfloat16)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of bf16 matrices, summed and returned in fp32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
