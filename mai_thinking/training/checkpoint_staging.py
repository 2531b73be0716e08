"""A state's tensors, copied to host memory so that training can go on while they are written.

PyTorch's own `DefaultStager` does the same, but that of torch 2.11 empties itself after its first use and fails at the
second.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class HostCopies:
    """Copies in buffers that are used again from checkpoint to checkpoint: memory that was touched, and on a GPU's
    host pinned, before is several times faster to fill."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies by the same names (of a DTensor, of this rank's shard), valid until the next call."""
        used: dict[str, Tensor] = {}
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            used[name] = buffer.copy_(local, non_blocking=True)
            copies[name] = _like(tensor, buffer) if isinstance(tensor, DTensor) else buffer
        self._buffers = used
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def close(self) -> None:
        """Let go of the memory. What is pinned stays with PyTorch, for its next use."""
        self._buffers = {}


def _like(tensor: DTensor, local: Tensor) -> DTensor:
    """`tensor` with another local part. (`from_local` would take it back to the mesh's device.)"""
    return DTensor(local, tensor._spec, requires_grad=False)
