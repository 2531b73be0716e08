"""SwiGLU's backward between two grouped products, as one kernel on a GPU: every number is read and written once.

A compiler makes it two kernels that read everything twice, since the gates' gradient is a sum over a row.

Shapes: S rows, a token-expert pair each, F inner size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 256


@triton.jit
def swiglu_backward_kernel(d_ptr, gate_up_ptr, weight_ptr, d_gate_up_ptr, weighed_ptr, d_weight_ptr, rows, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    weight = tl.load(weight_ptr + row, mask=there, other=0.0)[:, None]
    d_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.static_range(0, F, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < F)[None, :]
        narrow = row[:, None] * F + column[None, :]
        wide = row[:, None] * (2 * F) + column[None, :]
        d = tl.load(d_ptr + narrow, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up_ptr + wide, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + wide + F, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        inner = silu * up
        d_weight += d * inner
        d_inner = d * weight
        d_gate = d_inner * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(d_gate_up_ptr + wide, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask=inside)
        tl.store(d_gate_up_ptr + wide + F, (d_inner * silu).to(d_gate_up_ptr.dtype.element_ty), mask=inside)
        tl.store(weighed_ptr + narrow, (inner * weight).to(weighed_ptr.dtype.element_ty), mask=inside)
    tl.store(d_weight_ptr + row, tl.sum(d_weight, axis=1), mask=there)


def swiglu_backward(d_unweighed_SF: Tensor, gate_up_S2F: Tensor, weight_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `grouped_experts.swiglu_backward`, of contiguous tensors on a GPU."""
    rows, inner = d_unweighed_SF.shape
    d_gate_up, weighed = torch.empty_like(gate_up_S2F), torch.empty_like(d_unweighed_SF)
    d_weight = torch.empty_like(weight_S)
    swiglu_backward_kernel[(triton.cdiv(rows, ROWS),)](
        d_unweighed_SF, gate_up_S2F, weight_S, d_gate_up, weighed, d_weight, rows, inner, ROWS, COLUMNS, num_warps=4
    )
    return d_gate_up, weighed, d_weight
