"""Ways to compute `Σ_k gate · expert(x)` for all tokens, registered with the transformers experts interface.

Shapes: T tokens, K chosen experts per token, S = T·K token-expert pairs, E experts, L latent size, F inner size;
in a bucket, n experts with room for c pairs each.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

BUCKETS = 8
"""Sorted by load, eight groups of experts waste little padding and still cost few products."""


def eager_experts(
    module: nn.Module, x_TL: torch.Tensor, chosen_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """The definition: one expert after another. [T, L], [T, K] int64, [T, K] → [T, L]. Slow to differentiate."""
    out_TL = torch.zeros(x_TL.shape, dtype=torch.float32, device=x_TL.device)
    for expert in chosen_TK.unique().tolist():
        token, slot = torch.where(chosen_TK == expert)
        gate, up = F.linear(x_TL[token], module.gate_up_proj[expert]).chunk(2, dim=-1)
        y = F.linear(module.act_fn(gate) * up, module.down_proj[expert])
        out_TL = out_TL.index_add(0, token, y.float() * gates_TK[token, slot, None])
    return out_TL.to(x_TL.dtype)


def bucketed_experts(
    module: nn.Module, x_TL: torch.Tensor, chosen_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """The same by batched products over groups of experts of like load. [T, L], [T, K] int64, [T, K] → [T, L].

    For CPUs, where one product an expert costs more to launch than to compute. On an accelerator the library's
    grouped product takes over. The combination is summed in fp32.
    """
    w_gate_up, w_down = module.gate_up_proj, module.down_proj
    if torch.is_autocast_enabled(x_TL.device.type):
        # Neither a custom autograd function nor the grouped product is cast by autocast itself.
        dtype = torch.get_autocast_dtype(x_TL.device.type)
        x_TL, w_gate_up, w_down = x_TL.to(dtype), w_gate_up.to(dtype), w_down.to(dtype)
    if x_TL.device.type != "cpu":
        return grouped_mm_experts_forward(_CastExperts(module, w_gate_up, w_down), x_TL, chosen_TK, gates_TK)
    y_SL = _BucketedSwiGLU.apply(x_TL, w_gate_up, w_down, chosen_TK)
    y_TKL = y_SL.view(*chosen_TK.shape, -1).float()
    return torch.einsum("tk,tkl->tl", gates_TK, y_TKL).to(x_TL.dtype)


class _CastExperts:
    """An experts module whose weights stand in cast, as `grouped_mm_experts_forward` reads it."""

    def __init__(self, module: nn.Module, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> None:
        self._module, self.gate_up_proj, self.down_proj = module, gate_up_proj, down_proj

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Bucket(NamedTuple):
    """A group of experts that are multiplied in one batch."""

    experts_n: torch.Tensor
    """Their indices, int64."""
    pairs_nc: torch.Tensor
    """Indices of their token-expert pairs, int64; S where there is none."""


def make_buckets(chosen_TK: torch.Tensor, experts: int) -> list[Bucket]:
    """Sort experts by load, leave out those without work, cut into groups and pad each to its own busiest expert."""
    expert_S = chosen_TK.flatten()
    by_expert_S = expert_S.argsort(stable=True)
    load_E = torch.bincount(expert_S, minlength=experts)
    start_E = load_E.cumsum(0) - load_E
    load_sorted, expert_sorted = load_E.sort(descending=True, stable=True)
    busy = int((load_sorted > 0).sum())
    # A pair index of S stands for "none": it reads the zero row that is appended to the inputs.
    by_expert_S = torch.cat((by_expert_S, by_expert_S.new_full((1,), expert_S.numel())))
    buckets = []
    for experts_n in expert_sorted[:busy].split(max(1, -(-busy // BUCKETS))):
        room = int(load_E[experts_n[0]])
        slot_c = torch.arange(room)
        place_nc = start_E[experts_n, None] + slot_c
        filled_nc = slot_c < load_E[experts_n, None]
        buckets.append(Bucket(experts_n, by_expert_S[torch.where(filled_nc, place_nc, expert_S.numel())]))
    return buckets


class _BucketedSwiGLU(torch.autograd.Function):
    """Every pair's expert output [S, L], in the order token-major; backward written out, since autograd would write a
    full-size zero gradient of the weights for every bucket."""

    @staticmethod
    def forward(
        ctx: Any, x_TL: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor, chosen_TK: torch.Tensor
    ) -> torch.Tensor:
        tokens, top_k = chosen_TK.shape
        pairs = tokens * top_k
        buckets = make_buckets(chosen_TK, w_gate_up.size(0))
        padded_x = torch.cat((x_TL, x_TL.new_zeros(1, x_TL.size(1))))
        y_SL = x_TL.new_empty(pairs + 1, x_TL.size(1))
        saved = []
        for experts_n, pairs_nc in buckets:
            x_ncL = padded_x[pairs_nc // top_k]
            gate_up_nc = x_ncL @ w_gate_up[experts_n].mT
            gate, up = gate_up_nc.chunk(2, dim=-1)
            y_ncL = (F.silu(gate) * up) @ w_down[experts_n].mT
            y_SL[pairs_nc.flatten()] = y_ncL.flatten(0, 1)
            saved += [experts_n, pairs_nc, x_ncL, gate_up_nc]
        ctx.save_for_backward(w_gate_up, w_down, *saved)
        ctx.shape = (tokens, top_k)
        return y_SL[:pairs]

    @staticmethod
    def backward(ctx: Any, dy_SL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        w_gate_up, w_down, *saved = ctx.saved_tensors
        tokens, top_k = ctx.shape
        padded_dy = torch.cat((dy_SL, dy_SL.new_zeros(1, dy_SL.size(1))))
        dx_SL = dy_SL.new_empty(padded_dy.shape)
        dw_gate_up, dw_down = torch.zeros_like(w_gate_up), torch.zeros_like(w_down)
        for i in range(0, len(saved), 4):
            experts_n, pairs_nc, x_ncL, gate_up_nc = saved[i : i + 4]
            dy_ncL = padded_dy[pairs_nc]
            gate, up = gate_up_nc.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            dw_down[experts_n] = dy_ncL.mT @ (silu * up)
            d_inner = dy_ncL @ w_down[experts_n]
            # d silu(g)/dg = σ(g)·(1 + g·(1 − σ(g))) = σ + silu·(1 − σ)
            d_gate_up = torch.cat((d_inner * up * (sigmoid + silu * (1 - sigmoid)), d_inner * silu), dim=-1)
            dw_gate_up[experts_n] = d_gate_up.mT @ x_ncL
            dx_SL[pairs_nc.flatten()] = (d_gate_up @ w_gate_up[experts_n]).flatten(0, 1)
        dx_TL = dx_SL[:-1].view(tokens, top_k, -1).sum(dim=1)
        return dx_TL, dw_gate_up, dw_down, None


ALL_EXPERTS_FUNCTIONS.register("bucketed_mm", bucketed_experts)
