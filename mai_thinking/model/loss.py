"""Cross-entropy of a large vocabulary without holding all logits."""

from typing import Any

import torch
from torch import Tensor

from mai_thinking.model.fused import fused
from mai_thinking.model.projection import fp32_product

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}
"""Logits held at once. On a CPU they should stay near its caches; on a GPU a chunk should fill the machine."""


def chunked_cross_entropy(
    hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Σ over labels ≠ -100 of −log softmax(hidden · weightᵀ)[label], a scalar in fp32. `dtype` is what the product's
    operands are rounded to, if not left in the weight's. Tokens go through in chunks, and where a gradient is wanted it
    is computed with the chunk's logits at hand, so that neither pass ever sees all of them. Differentiable once."""
    hidden_TD = hidden_BTD.flatten(0, 1).to(dtype or weight_VD.dtype)
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, labels_BT.flatten())


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss forward, and the gradient of it: d loss / d logits = softmax − one-hot. Products are in the hidden states'
    dtype."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        on_gpu = hidden_TD.is_cuda
        score = fused(_loss_and_gradient) if on_gpu else _loss_and_gradient
        operand_VD = weight_VD.to(hidden_TD.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        d_hidden = torch.zeros_like(hidden_TD) if wants_gradient else None
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_gradient else None
        size = max(1, CHUNK_ELEMENTS.get(hidden_TD.device.type, 2**24) // weight_VD.size(0))
        for begin in range(0, hidden_TD.size(0), size):
            chunk = slice(begin, begin + size)
            hidden, labels = hidden_TD[chunk], labels_T[chunk]
            logits = fp32_product(hidden, operand_VD.mT)
            chunk_loss, d_logits = score(logits, labels, operand_VD.dtype, wants_gradient, in_place=not on_gpu)
            loss += chunk_loss
            if d_hidden is None or d_weight is None or d_logits is None:
                continue
            torch.mm(d_logits, operand_VD, out=d_hidden[chunk])
            if d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.mT, hidden)
            else:
                d_weight += fp32_product(d_logits.mT, hidden)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        # In at least fp32: a rounded factor would scale all of it alike.
        wide = torch.promote_types(d_hidden.dtype, d_loss.dtype)
        d_hidden = (d_hidden.to(wide) * d_loss.to(wide)).to(d_hidden.dtype)
        return d_hidden, (d_weight * d_loss).to(ctx.weight_dtype), None


def _loss_and_gradient(
    logits_TV: Tensor, labels_T: Tensor, dtype: torch.dtype, wants_gradient: bool, *, in_place: bool
) -> tuple[Tensor, Tensor | None]:
    """Σ of the labels' −log softmax, and the logits' gradient in `dtype`. `in_place`, it takes their place; otherwise
    it is written for a compiler: two passes over the logits, and one that writes the gradient."""
    log_z = logits_TV.logsumexp(dim=-1, keepdim=True)
    counted = (labels_T != -100)[:, None]
    target = labels_T.clamp(min=0)[:, None]
    loss = torch.where(counted, log_z - logits_TV.gather(1, target), 0.0).sum()
    if not wants_gradient:
        return loss, None
    if in_place:
        d_logits = logits_TV.sub_(log_z).exp_().mul_(counted)
        return loss, d_logits.scatter_add_(1, target, -counted.to(d_logits.dtype)).to(dtype)
    is_target = labels_T[:, None] == torch.arange(logits_TV.size(1), device=logits_TV.device)
    return loss, torch.where(counted, (logits_TV - log_z).exp() - is_target.float(), 0.0).to(dtype)
