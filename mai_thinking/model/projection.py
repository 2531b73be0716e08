"""What the model's linear maps have in common: how they are initialised, and in which dtype they compute."""

import torch
from torch import nn
from transformers import PretrainedConfig

HALF = (torch.bfloat16, torch.float16)
WIDE = (*HALF, torch.float32, torch.float64)


def residual_projection(inputs: int, outputs: int) -> nn.Linear:
    """A linear map without bias whose output is added to the residual stream, marked so that its weights are
    initialised 1/√(residual connections) smaller."""
    projection = nn.Linear(inputs, outputs, bias=False)
    projection.feeds_residual = True  # type: ignore[assignment]
    return projection


def weight_dtype(projection: nn.Module, config: PretrainedConfig) -> torch.dtype:
    """What goes into `projection`: its weights' dtype or, where they are packed (quantised), the model's."""
    dtype = getattr(getattr(projection, "weight", None), "dtype", None)
    return dtype if dtype in WIDE else (config.dtype or torch.float32)
