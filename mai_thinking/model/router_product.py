"""The router's product: fp32 whatever is around it (MAI-Thinking-1 report §2.1), by a GPU's matrix units.

They have no fp32, and the product without them takes some fifteen times as long as one of bf16. But an fp32 number's 24
bits are three bf16 numbers of eight: high, middle and low. The product of two such sums is nine products of bf16, of
which six reach into the result's 24 bits. The units sum in fp32 but cut off where fp32 rounds, at each sixteen terms:
what is large is a sum of its own, so that the others' terms do not cut it off once more:

    x · wᵀ  =  h · hᵀ  +  [h m h m l] · [m h l m h]ᵀ

The gradients are made of the first two parts, which keep 16 bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mai_thinking.model.projection import fp32_product


def router_product(x_TD: Tensor, weight_ED: Tensor, *, by_parts: bool) -> Tensor:
    """x · weightᵀ in fp32: [T, D], [E, D] → [T, E]; `by_parts` as above."""
    return _RouterProduct.apply(x_TD, weight_ED) if by_parts else F.linear(x_TD, weight_ED)


class _RouterProduct(torch.autograd.Function):
    """The product by parts, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        xh, xm, xl = parts(x_TD)
        wh, wm, wl = parts(weight_ED)
        lower = fp32_product(torch.cat((xh, xm, xh, xm, xl), dim=1), torch.cat((wm, wh, wl, wm, wh), dim=1).mT)
        return fp32_product(xh, wh.mT) + lower

    @staticmethod
    def backward(ctx: Any, d_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        E, D = weight_ED.shape
        (dh, dm, _), (wh, wm, _), (xh, xm, _) = parts(d_TE), parts(weight_ED), parts(x_TD)
        dx_TD = fp32_product(torch.cat((dh, dm, dh), dim=1), torch.cat((wh, wh, wm)))
        crossed = fp32_product(torch.cat((dh, dm), dim=1).mT, torch.cat((xh, xm), dim=1))
        return dx_TD, crossed[:E, :D] + crossed[E:, :D] + crossed[:E, D:]


def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bf16 tensors whose sum is fp32 `x`, bit for bit, unless it is next to the smallest that there are."""
    # Cut off, not rounded: a compiler takes a number's way to bf16 and back for nothing, and the rest would be 0.
    high = _first_eight_bits(x)
    middle = _first_eight_bits(x - high)
    low = x - high - middle
    return high.to(torch.bfloat16), middle.to(torch.bfloat16), low.to(torch.bfloat16)


def _first_eight_bits(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & -65536).view(torch.float32)
