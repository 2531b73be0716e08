"""The experts on a GPU: the pairs sorted by expert, and one grouped product for all experts at a time.

    pairs        t0·e7  t0·e2  t1·e7 …          each token K times
    sorted       e2: t0 …   e7: t0 t1 …         x gathered in this order, [S, L]
    products     [S, L] → gate, up [S, 2F] → silu(gate) · up [S, F] → y [S, L], a group of rows an expert
    combined     Σ_k gate · y, each token's K rows gathered back

Everything has a shape that is known beforehand, so that a step can be compiled or captured in a graph. The backward is
written out: autograd would add the gathers' gradients up by atomic additions, slowly and in any order, and would keep
the gathered rows and every product. Kept are the inputs and gate and up; the gates' gradient is had from the inner
activations, so that y is not needed.

Shapes: T tokens, K chosen experts per token, S = T·K token-expert pairs, E experts, L latent size, F inner size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_experts(x_TL: Tensor, w_gate_up: Tensor, w_down: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
    """Σ_k gate · expert(x): [T, L], [E, 2F, L], [E, L, F], [T, K], [T, K] int64 → [T, L]. No pair is dropped, and the
    same inputs give the same bits. Products are in the dtype of `x_TL`, which the library's grouped product must know;
    between them all is fp32, the combination too."""
    return _GroupedSwiGLU.apply(x_TL, w_gate_up, w_down, gates_TK, chosen_TK)


class RowOrder(NamedTuple):
    """Pairs sorted by expert, and within an expert by token: each row's pair (token · K + slot) and each pair's row,
    int64, and where each expert's rows end, int32, as the grouped product takes it."""

    pair_S: Tensor
    row_TK: Tensor
    ends_E: Tensor

    @classmethod
    def of(cls, chosen_TK: Tensor, experts: int) -> "RowOrder":
        """By a stable sort of [T, K] indices of experts."""
        # A radix sort's passes go by the keys' width.
        key_S = chosen_TK.flatten().to(torch.int16 if experts < 2**15 else torch.int32)
        sorted_S, pair_S = torch.sort(key_S, stable=True)
        each_E = torch.arange(experts, device=key_S.device, dtype=key_S.dtype)
        ends_E = torch.searchsorted(sorted_S, each_E, right=True, out_int32=True)
        row_S = torch.empty_like(pair_S).scatter_(0, pair_S, torch.arange(pair_S.size(0), device=pair_S.device))
        return cls(pair_S, row_S.view(chosen_TK.shape), ends_E)


class _GroupedSwiGLU(torch.autograd.Function):
    """The experts and their combination, differentiable in inputs, weights and gates."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TL: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        gates_TK: Tensor,
        chosen_TK: Tensor,
    ) -> Tensor:
        ctx.weight_dtype = w_gate_up.dtype
        w_gate_up, w_down = w_gate_up.to(x_TL.dtype), w_down.to(x_TL.dtype)
        order = RowOrder.of(chosen_TK, w_gate_up.size(0))
        x_SL = x_TL[order.pair_S // chosen_TK.size(1)]
        gate_up_SF = F.grouped_mm(x_SL, w_gate_up.mT, offs=order.ends_E)
        gate, up = gate_up_SF.float().chunk(2, dim=-1)
        inner_SF = (F.silu(gate) * up).to(x_TL.dtype)
        y_SL = F.grouped_mm(inner_SF, w_down.mT, offs=order.ends_E)
        ctx.save_for_backward(x_TL, w_gate_up, w_down, gates_TK, gate_up_SF, *order)
        return sum_of_rows(y_SL, order.row_TK, gates_TK).to(x_TL.dtype)

    @staticmethod
    def backward(ctx: Any, dout_TL: Tensor) -> tuple[Tensor | None, ...]:
        x_TL, w_gate_up, w_down, gates_TK, gate_up_SF, *order_parts = ctx.saved_tensors
        order = RowOrder(*order_parts)
        token_S = order.pair_S // gates_TK.size(1)
        x_SL, dout_SL = x_TL[token_S], dout_TL[token_S]
        # Of the inner activations before they are weighed: y and its gradient are never needed.
        d_unweighed_SF = F.grouped_mm(dout_SL, w_down, offs=order.ends_E)
        gate_S = gates_TK.float().flatten()[order.pair_S]
        d_gate_up_SF, weighed_SF, dgates_S = swiglu_backward(d_unweighed_SF, gate_up_SF, gate_S)
        dw_down = F.grouped_mm(dout_SL.mT, weighed_SF, offs=order.ends_E)
        dw_gate_up = F.grouped_mm(d_gate_up_SF.mT, x_SL, offs=order.ends_E)
        dx_SL = F.grouped_mm(d_gate_up_SF, w_gate_up, offs=order.ends_E)
        dx_TL = sum_of_rows(dx_SL, order.row_TK, torch.ones_like(gates_TK)).to(x_TL.dtype)
        dgates_TK = dgates_S[order.row_TK].to(gates_TK.dtype)
        return dx_TL, dw_gate_up.to(ctx.weight_dtype), dw_down.to(ctx.weight_dtype), dgates_TK, None


def sum_of_rows(rows_SL: Tensor, row_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Σ_k weight · row, [T, L] fp32."""
    if not torch.compiler.is_compiling():
        return (rows_SL[row_TK].float() * weights_TK.float()[..., None]).sum(dim=1)
    # A compiler's sum over so few rows is four times slower than adding them one by one.
    first, *others = (rows_SL[row_TK[:, k]].float() * weights_TK[:, k, None].float() for k in range(row_TK.size(1)))
    return sum(others, first)


@torch.library.custom_op("mai_thinking::swiglu_backward", mutates_args=())
def swiglu_backward(d_unweighed_SF: Tensor, gate_up_S2F: Tensor, weight_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Given the gradient of inner = silu(gate) · up as it would be before weighing, [S, F], and the rows' weights [S]
    fp32: the gradient of gate and up [S, 2F], inner · weight [S, F], and the gradient of the weights [S] fp32."""
    gate, up = gate_up_S2F.float().chunk(2, dim=-1)
    d_unweighed, weight_S1 = d_unweighed_SF.float(), weight_S[:, None]
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    inner = silu * up
    d_inner = d_unweighed * weight_S1
    d_gate = d_inner * up * (sigmoid + silu * (1.0 - sigmoid))
    dtype = gate_up_S2F.dtype
    return (
        torch.cat((d_gate, d_inner * silu), dim=-1).to(dtype),
        (inner * weight_S1).to(dtype),
        (d_unweighed * inner).sum(dim=-1),
    )


swiglu_backward.register_fake(lambda d, gate_up, weight: tuple(map(torch.empty_like, (gate_up, d, weight))))


@swiglu_backward.register_kernel("cuda")
def _(d_unweighed_SF: Tensor, gate_up_S2F: Tensor, weight_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from mai_thinking.model import swiglu_kernel  # brings Triton, which only builds for a GPU have

    return swiglu_kernel.swiglu_backward(d_unweighed_SF.contiguous(), gate_up_S2F.contiguous(), weight_S.contiguous())
