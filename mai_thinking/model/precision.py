"""In which precision a model computes."""

import torch
from torch import nn
from transformers import PretrainedConfig

HALF = (torch.bfloat16, torch.float16)
WIDE = (*HALF, torch.float32, torch.float64)


def weight_dtype(projection: nn.Module, config: PretrainedConfig) -> torch.dtype:
    """What goes into `projection`: its weights' dtype or, where they are packed (quantised), the model's."""
    dtype = getattr(getattr(projection, "weight", None), "dtype", None)
    return dtype if dtype in WIDE else (config.dtype or torch.float32)
