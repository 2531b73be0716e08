"""Cross-entropy of a large vocabulary without holding all logits."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Logits held at once: 64 MiB in fp32, small enough to stay cheap, large enough to keep the product efficient."""


def chunked_cross_entropy(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Σ over labels ≠ -100 of −log softmax(hidden · weightᵀ)[label], a scalar in fp32.

    Tokens go through in chunks whose logits are computed again in the backward pass.
    """
    hidden_TD, labels_T = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    size = max(1, CHUNK_ELEMENTS // weight_VD.size(0))
    losses = [
        checkpoint(_summed_cross_entropy, hidden, weight_VD, labels, use_reentrant=False, preserve_rng_state=False)
        for hidden, labels in zip(hidden_TD.split(size), labels_T.split(size), strict=True)
    ]
    return torch.stack(losses).sum()


def _summed_cross_entropy(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    logits_TV = F.linear(hidden_TD.to(weight_VD.dtype), weight_VD).float()
    return F.cross_entropy(logits_TV, labels_T, ignore_index=-100, reduction="sum")
