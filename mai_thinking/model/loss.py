"""Cross-entropy of a large vocabulary without holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}
"""Logits held at once. On a CPU they should stay near its caches; on a GPU a chunk should fill the machine."""


def chunked_cross_entropy(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Σ over labels ≠ -100 of −log softmax(hidden · weightᵀ)[label], a scalar in fp32.

    Tokens go through in chunks, and where a gradient is wanted it is computed with the chunk's logits at hand, so that
    neither pass ever sees all of them. Differentiable once.
    """
    hidden_TD = hidden_BTD.flatten(0, 1).to(weight_VD.dtype)
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, labels_BT.flatten())


def logits_product(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """hidden · weightᵀ, [N, V] fp32. On a GPU, `dtype` bf16 means a product of bf16 operands, summed and returned in
    fp32; otherwise it is the product in the weight's own dtype."""
    if dtype is torch.bfloat16 and hidden_ND.device.type == "cuda":
        return torch.mm(hidden_ND.to(dtype), weight_VD.to(dtype).T, out_dtype=torch.float32)
    return F.linear(hidden_ND.to(weight_VD.dtype), weight_VD).float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss forward, and the gradient of it: d loss / d logits = softmax − one-hot."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        d_hidden = torch.zeros_like(hidden_TD) if wants_gradient else None
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_gradient else None
        size = max(1, CHUNK_ELEMENTS.get(hidden_TD.device.type, 2**24) // weight_VD.size(0))
        for begin in range(0, hidden_TD.size(0), size):
            chunk = slice(begin, begin + size)
            hidden, labels = hidden_TD[chunk], labels_T[chunk]
            logits = F.linear(hidden, weight_VD).float()
            log_z = logits.logsumexp(dim=-1, keepdim=True)
            counted = (labels != -100)[:, None]
            target = labels.clamp(min=0)[:, None]
            loss += torch.where(counted, log_z - logits.gather(1, target), 0.0).sum()
            if d_hidden is None or d_weight is None:
                continue
            d_logits = logits.sub_(log_z).exp_().mul_(counted)
            d_logits.scatter_add_(1, target, -counted.to(d_logits.dtype))
            d_logits = d_logits.to(weight_VD.dtype)
            torch.mm(d_logits, weight_VD, out=d_hidden[chunk])
            if d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.mT, hidden)
            else:
                d_weight += d_logits.mT @ hidden
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), (d_weight * d_loss).to(ctx.weight_dtype), None
