"""The search for a nucleus's end as one kernel on a GPU: a row of probabilities stays in its caches for thirty sums.

Shapes: A rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl

COLUMNS = 8192


@triton.jit
def nucleus_kernel(p_ptr, least_ptr, top_p, V: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    least = tl.zeros((), tl.int32)
    for turn in range(30):
        higher = least + (1 << (29 - turn))
        mass = tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, V, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            p = tl.load(p_ptr + row * V + column, mask=column < V, other=0.0)
            mass += tl.where(p.to(tl.int32, bitcast=True) >= higher, p, 0.0)
        least = tl.where(tl.sum(mass) >= top_p, higher, least)
    tl.store(least_ptr + row, least)


def least_likely(p_AV: torch.Tensor, top_p: float) -> torch.Tensor:
    """As `nucleus.least_likely`, of contiguous fp32 probabilities on a GPU."""
    A, V = p_AV.shape
    least_A1 = torch.empty(A, 1, dtype=torch.int32, device=p_AV.device)
    nucleus_kernel[(A,)](p_AV, least_A1, top_p, V, COLUMNS, num_warps=16)
    return least_A1
