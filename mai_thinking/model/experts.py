"""Ways to compute `Σ_k gate · expert(x)` for all tokens, registered with the transformers experts interface.

`eager_experts` is the definition. `bucketed_experts` is for CPUs, where one product an expert costs more to start than
to compute, and where memory traffic decides the rest. It sorts the experts by load and cuts them into buckets of like
load, each padded with rows of zeros to its busiest expert:

    ████████  ███████·  ███████·  |  ████  ████  ███·  ███·  |  █  █  █  █        one bar an expert, one block a pair

A bucket is a few batched products. It is as large as a cache holds; its inputs and weights are gathered into the same
scratch memory as the last one's, and worked on there in place. So main memory sees each weight read once and each
gradient written once. The backward is written out, since autograd would write a full-size zero gradient of the weights
for every bucket.

Shapes: T tokens, K chosen experts per token, S = T·K token-expert pairs, E experts, L latent size, F inner size;
P rows of all buckets, a pair's or padding; in one bucket n experts with room for c pairs each, R = n·c rows. Weights
are w_gate_up [E, 2F, L], gate first, and w_down [E, L, F].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from mai_thinking.model.fused import fused
from mai_thinking.model.grouped_experts import grouped_experts

CACHE_BYTES = 6 * 2**20
"""A bucket's working set. With 1 MiB of L2 a core, 2 to 6 MiB did alike and 12 MiB took a third more time; on another
machine 6 MiB took a twentieth less than 4."""
LIKE_LOAD = 0.8
"""No expert joins a bucket that has less than this share of its busiest one's load: the rest would be padding,"""
FEW_EXPERTS = 16
"""unless the bucket has fewer experts than this: then another round of products costs more than the padding."""
PAIRS_PER_EXPERT = 1
"""With no more pairs than this, as in decoding, few share an expert, and sorting costs more than it saves."""


def own_weights(module: Any) -> tuple[Tensor, Tensor]:
    """Both of an experts module's weights, of the experts that this rank has: all, unless ranks divide them; or the
    rounded copies that stand for them (`latent_moe.rounded_once`)."""
    if (copies := getattr(module, "copies", None)) is not None:
        return copies
    w_gate_up, w_down = (w.to_local() if isinstance(w, DTensor) else w for w in (module.gate_up_proj, module.down_proj))
    return w_gate_up, w_down


def eager_experts(module: Any, x_TL: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """The definition: one expert after another. [T, L], [T, K] int64, [T, K] → [T, L]. Slow to differentiate."""
    w_gate_up, w_down = own_weights(module)
    out_TL = torch.zeros(x_TL.shape, dtype=_wide(x_TL), device=x_TL.device)
    for expert in chosen_TK.unique().tolist():
        token, slot = torch.where(chosen_TK == expert)
        gate, up = F.linear(x_TL[token], w_gate_up[expert]).chunk(2, dim=-1)
        y = F.linear(module.act_fn(gate) * up, w_down[expert])
        out_TL = out_TL.index_add(0, token, y.to(out_TL.dtype) * gates_TK[token, slot, None])
    return out_TL.to(x_TL.dtype)


def bucketed_experts(module: Any, x_TL: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """The same by batched products over buckets of experts. [T, L], [T, K] int64, [T, K] → [T, L]. No pair is dropped,
    and the same inputs give the same bits. The combination is summed in fp32, or in float64 if that is what comes in.
    On a GPU, and in a compiled graph, grouped products take over: ours in bf16 on a GPU (`model.grouped_experts`), else
    the library's."""
    device = x_TL.device.type
    w_gate_up, w_down = own_weights(module)
    # Neither a custom autograd function nor the grouped product is cast by autocast itself.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w_gate_up.dtype
    x_TL = x_TL.to(dtype)
    if getattr(module, "_is_expert_parallel", False):  # what other ranks' experts do comes with a gate of 0
        chosen_TK = chosen_TK.clamp(max=w_gate_up.size(0) - 1)
    inputs = x_TL, w_gate_up, w_down, gates_TK, chosen_TK
    if (exchange := getattr(module, "exchange", None)) is not None:
        return exchange(partial(_product, module, fused(grouped_experts)), *inputs)
    return _product(module, grouped_experts, *inputs)


def _product(
    module: Any,
    grouped: Callable[..., Tensor],
    x_TL: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    gates_TK: Tensor,
    chosen_TK: Tensor,
) -> Tensor:
    """By the computation that suits the device, in the dtype of `x_TL`. `grouped` is `grouped_experts`, compiled by
    itself where it is in no graph."""
    on_gpu = x_TL.device.type != "cpu"
    if on_gpu and _fits_grouped_product(x_TL.dtype, w_gate_up, w_down):
        return grouped(x_TL, w_gate_up, w_down, gates_TK, chosen_TK)
    w_gate_up, w_down = w_gate_up.to(x_TL.dtype), w_down.to(x_TL.dtype)
    # The buckets' shapes depend on the data, which one graph cannot have.
    if on_gpu or torch.compiler.is_compiling():
        return grouped_mm_experts_forward(CastExperts(module, w_gate_up, w_down), x_TL, chosen_TK, gates_TK)
    return _bucketed_on_cpu(x_TL, w_gate_up, w_down, gates_TK, chosen_TK)


def _fits_grouped_product(dtype: torch.dtype, *weights: Tensor) -> bool:
    """bf16, and whole lines of 16 bytes."""
    return dtype == torch.bfloat16 and all(size % 8 == 0 for weight in weights for size in weight.shape[1:])


class CastExperts:
    """An experts module whose weights stand in cast, as `grouped_mm_experts_forward` reads it."""

    def __init__(self, module: Any, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        self._module, self.gate_up_proj, self.down_proj = module, gate_up_proj, down_proj
        self.num_experts = gate_up_proj.size(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _bucketed_on_cpu(x_TL: Tensor, w_gate_up: Tensor, w_down: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return _BucketedSwiGLU.apply(x_TL, w_gate_up, w_down, gates_TK, chosen_TK)
    if chosen_TK.size(0) == 1:
        return _one_token(x_TL, w_gate_up, w_down, gates_TK, chosen_TK)
    if chosen_TK.numel() <= PAIRS_PER_EXPERT * w_gate_up.size(0):
        return _pair_by_pair(x_TL, w_gate_up, w_down, gates_TK, chosen_TK)
    layout = bucket_layout(chosen_TK, w_gate_up)
    return _combine(_bucket_by_bucket(layout, x_TL, w_gate_up, w_down, gate_up_P=None), layout.row_TK, gates_TK)


class Bucket(NamedTuple):
    """Experts that are multiplied in one batch: their indices, int64; their rows among P, the first expert's c, the
    second's c, …; and c, the busiest one's load."""

    experts_n: Tensor
    rows: slice
    room: int

    def of(self, whole_P: Tensor) -> Tensor:
        """This bucket's part of a tensor over all rows, [P, d] → [n, c, d]; a view."""
        return whole_P[self.rows].view(-1, self.room, whole_P.size(1))

    def on(self, scratch: Tensor) -> Tensor:
        """As much of a scratch tensor as this bucket needs, [at least R, d] → [n, c, d]; a view."""
        return scratch[: self.rows.stop - self.rows.start].view(-1, self.room, scratch.size(1))

    def gather(self, source: Tensor, index_P: Tensor, out: Tensor) -> Tensor:
        """Rows of `source` [·, d] into scratch → [n, c, d]. `source[index]` would be five times slower."""
        out_R = out[: self.rows.stop - self.rows.start]
        return torch.index_select(source, 0, index_P[self.rows], out=out_R).view(-1, self.room, source.size(1))


class BucketLayout(NamedTuple):
    """Where each token-expert pair is computed: each row's pair (token · K + slot; S where the row is padding), each
    pair's row, the experts without work, and the buckets. All indices int64."""

    pair_P: Tensor
    row_TK: Tensor
    idle: Tensor
    buckets: list[Bucket]

    def tokens(self) -> Tensor:
        """Each row's token, [P]; T where the row is padding."""
        return self.pair_P // self.row_TK.size(1)

    def scratch(self, like: Tensor, *widths: int) -> list[Tensor]:
        """Uninitialised [R, width] tensors with room for the largest bucket."""
        rows = max((b.rows.stop - b.rows.start for b in self.buckets), default=0)
        return [like.new_empty(rows, width) for width in widths]

    def weight_scratch(self, *weights: Tensor) -> list[Tensor]:
        """Uninitialised [n, ...] tensors with room for the largest bucket's share of each of `weights`."""
        most = max((b.experts_n.size(0) for b in self.buckets), default=0)
        return [w.new_empty(most, *w.shape[1:]) for w in weights]


def bucket_layout(chosen_TK: Tensor, w_gate_up: Tensor) -> BucketLayout:
    """Sort experts by load, leave out those without work, and cut where the load falls off or the cache is full. In
    NumPy: these many small steps, which start several times faster there, are a good part of decoding."""
    experts, width, latent = w_gate_up.shape
    expert_S = chosen_TK.flatten().numpy()
    load_E = np.bincount(expert_S, minlength=experts)
    by_load_E = np.argsort(-load_E, kind="stable")
    loads = load_E[by_load_E[: np.count_nonzero(load_E)]].tolist()
    by_load = torch.from_numpy(by_load_E)

    # The backward holds, of a row, x and dy, gate and up, their gradients, the inner activation and its gradient.
    row_bytes = (2 * latent + 3 * width) * w_gate_up.itemsize
    expert_bytes = 3 * latent * width // 2 * w_gate_up.itemsize
    buckets: list[Bucket] = []
    first_row_E = np.zeros(experts, dtype=np.int64)
    start = row = 0
    while start < len(loads):
        room = loads[start]
        fitting = min(len(loads), start + max(1, CACHE_BYTES // (expert_bytes + room * row_bytes)))
        stop = min(fitting, start + FEW_EXPERTS)
        while stop < fitting and loads[stop] >= LIKE_LOAD * room:
            stop += 1
        end = row + (stop - start) * room
        buckets.append(Bucket(by_load[start:stop], slice(row, end), room))
        first_row_E[by_load_E[start:stop]] = np.arange(row, end, room)
        start, row = stop, end

    # 16-bit integers are sorted by radix, several times faster.
    by_expert_S = np.argsort(expert_S.astype(np.int16) if experts < 2**15 else expert_S, kind="stable")
    # A pair's row: its expert's first row, plus the pair's place among its expert's pairs.
    shift_E = first_row_E - (np.cumsum(load_E) - load_E)
    row_by_expert_S = shift_E[expert_S[by_expert_S]] + np.arange(expert_S.size)
    pair_P = np.full(row, expert_S.size)
    pair_P[row_by_expert_S] = by_expert_S
    row_S = np.empty_like(by_expert_S)
    row_S[by_expert_S] = row_by_expert_S
    return BucketLayout(
        torch.from_numpy(pair_P), torch.from_numpy(row_S).view(chosen_TK.shape), by_load[len(loads) :], buckets
    )


class _BucketedSwiGLU(torch.autograd.Function):
    """The experts and their combination, differentiable in inputs, weights and gates."""

    @staticmethod
    def forward(
        ctx: Any, x_TL: Tensor, w_gate_up: Tensor, w_down: Tensor, gates_TK: Tensor, chosen_TK: Tensor
    ) -> Tensor:
        layout = bucket_layout(chosen_TK, w_gate_up)
        gate_up_P = x_TL.new_empty(layout.pair_P.size(0), w_gate_up.size(1))
        y_PL = _bucket_by_bucket(layout, x_TL, w_gate_up, w_down, gate_up_P)
        ctx.save_for_backward(
            x_TL, w_gate_up, w_down, gates_TK, y_PL, gate_up_P, layout.pair_P, layout.row_TK, layout.idle
        )
        ctx.buckets = layout.buckets
        return _combine(y_PL, layout.row_TK, gates_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TL: Tensor) -> tuple[Tensor | None, ...]:
        x_TL, w_gate_up, w_down, gates_TK, y_PL, gate_up_P, pair_P, row_TK, idle = ctx.saved_tensors
        layout = BucketLayout(pair_P, row_TK, idle, ctx.buckets)
        latent, width = x_TL.size(1), w_gate_up.size(1)
        y_TKL = y_PL.index_select(0, row_TK.flatten()).view(*row_TK.shape, latent)
        dgates_TK = _products(dout_TL.unsqueeze(1), y_TKL.mT).squeeze(1).to(gates_TK.dtype)

        weights_too = any(ctx.needs_input_grad[1:3])
        dw_gate_up, dw_down = (
            torch.empty_like(w).index_fill_(0, idle, 0.0) if weights_too else None for w in (w_gate_up, w_down)
        )
        dx_PL = torch.empty_like(y_PL)
        token_P = layout.tokens()
        gate_P1 = _with_zero_row(gates_TK.reshape(-1, 1)).index_select(0, pair_P)
        x_dout = _with_zero_row(torch.cat((x_TL, dout_TL), dim=1))
        x_dy, inner, d_inner, d_gate_up = layout.scratch(x_TL, 2 * latent, width // 2, width // 2, width)
        w_scratch, d_scratch = layout.weight_scratch(w_gate_up, w_down)
        for bucket in layout.buckets:
            n = bucket.experts_n.size(0)
            w_n = torch.index_select(w_gate_up, 0, bucket.experts_n, out=w_scratch[:n])
            d_n = torch.index_select(w_down, 0, bucket.experts_n, out=d_scratch[:n])
            x_nc, dy_nc = bucket.gather(x_dout, token_P, out=x_dy).chunk(2, dim=-1)
            dy_nc.mul_(bucket.of(gate_P1))
            gate, up = bucket.of(gate_up_P).chunk(2, dim=-1)
            d_gate_up_nc = bucket.on(d_gate_up)
            d_gate, d_up = d_gate_up_nc.chunk(2, dim=-1)
            # inner = silu(gate) · up
            d_inner_nc = torch.bmm(dy_nc, d_n, out=bucket.on(d_inner))
            silu = torch.ops.aten.silu.out(gate, out=bucket.on(inner))
            torch.mul(d_inner_nc, silu, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_inner_nc.mul_(up), gate, grad_input=d_gate)
            torch.bmm(d_gate_up_nc, w_n, out=bucket.of(dx_PL))
            if dw_gate_up is not None and dw_down is not None:
                # The weights' scratch has served: their gradients take its place.
                dw_gate_up.index_copy_(0, bucket.experts_n, torch.bmm(d_gate_up_nc.mT, x_nc, out=w_n))
                dw_down.index_copy_(0, bucket.experts_n, torch.bmm(dy_nc.mT, silu.mul_(up), out=d_n))
        return F.embedding_bag(row_TK, dx_PL, mode="sum"), dw_gate_up, dw_down, dgates_TK, None


def _bucket_by_bucket(
    layout: BucketLayout, x_TL: Tensor, w_gate_up: Tensor, w_down: Tensor, gate_up_P: Tensor | None
) -> Tensor:
    """→ every row's output [P, L]. Its gate and up are left in `gate_up_P` [P, 2F], if given."""
    latent, width = x_TL.size(1), w_gate_up.size(1)
    y_PL = x_TL.new_empty(layout.pair_P.size(0), latent)
    padded_x, token_P = _with_zero_row(x_TL), layout.tokens()
    x, inner, gate_up = layout.scratch(x_TL, latent, width // 2, width)
    w_scratch, d_scratch = layout.weight_scratch(w_gate_up, w_down)
    for bucket in layout.buckets:
        n = bucket.experts_n.size(0)
        w_n = torch.index_select(w_gate_up, 0, bucket.experts_n, out=w_scratch[:n])
        d_n = torch.index_select(w_down, 0, bucket.experts_n, out=d_scratch[:n])
        x_nc = bucket.gather(padded_x, token_P, out=x)
        gate_up_nc = bucket.on(gate_up) if gate_up_P is None else bucket.of(gate_up_P)
        gate, up = torch.bmm(x_nc, w_n.mT, out=gate_up_nc).chunk(2, dim=-1)
        inner_nc = torch.ops.aten.silu.out(gate, out=bucket.on(inner)).mul_(up)
        torch.bmm(inner_nc, d_n.mT, out=bucket.of(y_PL))
    return y_PL


def _one_token(x_1L: Tensor, w_gate_up: Tensor, w_down: Tensor, gates_1K: Tensor, chosen_1K: Tensor) -> Tensor:
    """The experts of one token share its input: their gates and ups are one product. Every operation counts here."""
    expert_K = chosen_1K[0]
    gate_up_1 = F.linear(x_1L, w_gate_up.index_select(0, expert_K).flatten(0, 1))
    gate, up = gate_up_1.view(-1, 1, w_gate_up.size(1)).chunk(2, dim=-1)
    y_K1L = torch.bmm(F.silu(gate).mul_(up), w_down.index_select(0, expert_K).mT)
    return _products(gates_1K.unsqueeze(0), y_K1L.transpose(0, 1)).squeeze(0).to(x_1L.dtype)


def _pair_by_pair(x_TL: Tensor, w_gate_up: Tensor, w_down: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
    """Without sorting: each pair its own copy of its expert's weights, as many at a time as a cache holds."""
    expert_S = chosen_TK.flatten()
    x_S1L = x_TL.unsqueeze(1).expand(*chosen_TK.shape, -1).reshape(-1, 1, x_TL.size(1))
    gate, up = _times_chosen(x_S1L, w_gate_up, expert_S).chunk(2, dim=-1)
    y_S1L = _times_chosen(F.silu(gate).mul_(up), w_down, expert_S)
    y_TKL = y_S1L.view(*chosen_TK.shape, x_TL.size(1))
    return _products(gates_TK.unsqueeze(1), y_TKL).squeeze(1).to(x_TL.dtype)


def _times_chosen(x_S1I: Tensor, weight_EOI: Tensor, expert_S: Tensor) -> Tensor:
    """[S, 1, I], [E, O, I], [S] → [S, 1, O]. The copies stay in the cache, in the same scratch memory."""
    pairs, at_once = expert_S.size(0), max(1, CACHE_BYTES * weight_EOI.size(0) // weight_EOI.nbytes)
    if pairs <= at_once:
        return torch.bmm(x_S1I, weight_EOI.index_select(0, expert_S).mT)
    out_S1O = x_S1I.new_empty(pairs, 1, weight_EOI.size(1))
    scratch = weight_EOI.new_empty(at_once, *weight_EOI.shape[1:])
    for first in range(0, pairs, at_once):
        some = slice(first, first + at_once)
        expert = expert_S[some]
        copies = torch.index_select(weight_EOI, 0, expert, out=scratch[: expert.size(0)])
        torch.bmm(x_S1I[some], copies.mT, out=out_S1O[some])
    return out_S1O


def _combine(y_PL: Tensor, row_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """Σ_k gate · y: one pass that never holds all pairs' weighted outputs."""
    wide = _wide(y_PL)
    out_TL = F.embedding_bag(row_TK, y_PL.to(wide), mode="sum", per_sample_weights=gates_TK.to(wide))
    return out_TL.to(y_PL.dtype)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """A batched product in at least fp32, also where autocast is on, which leaves `out=` alone."""
    a, b = a.to(_wide(a)), b.to(_wide(b))
    return torch.bmm(a, b, out=a.new_empty(a.size(0), a.size(1), b.size(2)))


def _with_zero_row(rows: Tensor) -> Tensor:
    """Padding reads the last row. Zero times an uninitialised row could be NaN."""
    return torch.cat((rows, rows.new_zeros(1, rows.size(1))))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


ALL_EXPERTS_FUNCTIONS.register("bucketed_mm", bucketed_experts)
