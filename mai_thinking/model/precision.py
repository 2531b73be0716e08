"""In which precision a model computes."""

import torch

HALF = (torch.bfloat16, torch.float16)


def half_precision(weight: torch.Tensor) -> torch.dtype | None:
    """What layers with such weights compute in, if that is half precision on a GPU; None anywhere else."""
    if not weight.is_cuda:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    return dtype if dtype in HALF else None
