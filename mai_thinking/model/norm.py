"""RMSNorm in fp32, whatever the dtype around it (MAI-Thinking-1 report §2.6.2)."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) · gain over the last dimension; input of any dtype, output fp32. Gains start at `initial_gain`."""

    def __init__(self, size: int, epsilon: float, initial_gain: float = 1.0) -> None:
        super().__init__()
        self.initial_gain = initial_gain
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.size(-1),), self.weight.float(), self.epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, epsilon={self.epsilon}"
