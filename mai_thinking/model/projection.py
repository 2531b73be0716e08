"""What the model's linear maps have in common: how they are initialised, and in which dtype they compute."""

import torch
from torch import Tensor, nn
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


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a · b of two matrices of one dtype, summed in at least fp32 and returned in fp32. No gradient."""
    if a.is_cuda and a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) @ b.to(wide)).float()
