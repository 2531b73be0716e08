"""Large tensors in memory that is used again.

What the C library frees in large blocks goes back to the system, which hands out fresh memory a page at a time, zeroed,
at its first touch. For the gradients of all experts that takes longer than the products that fill them.
"""

import math
import sys
import threading
from collections.abc import Sequence

import torch

FORGET_AFTER = 256
"""Requests after which memory that served none of them is given back."""


class Recycler(threading.local):
    """Uninitialised CPU tensors in memory whose last owner has let go of it; every thread has its own.

    Nobody gives memory back: as long as a tensor, a view of it, a gradient, a NumPy array or a saved graph holds it, it
    is not handed out again. What is kept is what was held at once, at most.
    """

    def __init__(self) -> None:
        self._kept: list[_Memory] = []
        """The most recently handed out last."""
        self._requests = 0

    def empty(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor of `shape`, of the dtype of `like`, which is on the CPU. No gradient."""
        wanted = math.prod(shape) * like.itemsize
        self._requests += 1
        memory = self._take(wanted) or _Memory(wanted)
        memory.last_request = self._requests
        self._kept.append(memory)
        if self._requests % FORGET_AFTER == 0:
            limit = self._requests - FORGET_AFTER
            self._kept = [memory for memory in self._kept if memory.last_request > limit or not memory.idle]
        return memory.tensor(shape, like.dtype)

    def _take(self, wanted: int) -> "_Memory | None":
        """Idle memory of about the right size, the most recently used first: some of it may still be in a cache."""
        for place in reversed(range(len(self._kept))):
            if wanted <= self._kept[place].size <= 2 * wanted and self._kept[place].idle:
                return self._kept.pop(place)
        return None


class _Memory:
    """A block of memory, and who holds it."""

    def __init__(self, size: int) -> None:
        self.size = size
        """Bytes."""
        self.last_request = 0
        self._storage = torch.UntypedStorage(size)

    @property
    def idle(self) -> bool:
        """Whether nobody else holds it.

        Tensors hold it in C++. Whoever asks one of them for its storage in Python holds the object that we hold.
        """
        tensors = torch._C._storage_Use_Count(self._storage._cdata) - 1
        return tensors == 0 and sys.getrefcount(self._storage) == 2  # ours, and the call's argument

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The front of it. Not a view of another tensor: views share the counter by which autograd knows of changes."""
        strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
        return torch.empty(0, dtype=dtype).set_(self._storage, 0, torch.Size(shape), strides)
