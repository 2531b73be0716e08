"""Muon for the matrices between embeddings and head, AdamW for the rest (Jordan et al., 2024; arXiv 2502.16982).

The report trains with AdamW. For runs of minutes this gets further with the same text: an update is the momentum with
all its singular values near 1, so that directions that gradients seldom show are learned as fast as the others.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
UPDATE_RMS = 0.2
"""Of an update's entries, as AdamW's usually are: one learning rate serves both (arXiv 2502.16982)."""
_STEPS, _A, _B, _C = 5, 3.4445, -4.7750, 2.0315
"""Of the iteration, and its coefficients: singular values come to 0.7 … 1.2 in few steps rather than to 1 in many."""


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and Muon for groups that have `muon: True`. Their parameters are whole matrices [m, n]."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of both; leaves the matrices without gradients, so that AdamW passes over them."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        return super().step(closure)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for (rows, columns), alike in by_shape.items():
            update = orthogonalized(torch.stack([self._momentum(p, p.grad) for p in alike if p.grad is not None]))
            update *= UPDATE_RMS * max(rows, columns) ** 0.5
            for parameter, change in zip(alike, update, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])
                parameter.grad = None

    def _momentum(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """Nesterov's: the running mean of gradients, once more with the newest."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # which AdamW looks for when it loads a state
        mean = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(mean, MOMENTUM)


def orthogonalized(matrices: Tensor) -> Tensor:
    """[..., m, n] fp32 → the same with singular values near 1, by a quintic Newton–Schulz iteration; 0 stays 0."""
    upright = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if upright else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if upright else x
