"""Experts divided over ranks: rows travel to the rank that has their expert, and what it makes of them travels back.

    at home       each token's row K times, sorted by expert and so by owner:  e0 e0 e1 | e4 e5 e5 | …
    counts        how many rows of each expert go where: all-to-all
    rows          to their owners: all-to-all
    there         each through its expert, like a token that chose one expert and weighs it with 1
    rows          back home: all-to-all
    at home       Σ_k gate · row

No row is dropped. Routers and gates stay where the token is. MAI-Thinking-1 report §2.8.

Shapes: T tokens, K chosen experts per token, S = T·K rows that a rank sends, R rows that it receives, G ranks that
divide the experts, E experts, L latent size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd

from mai_thinking.errors import RunError
from mai_thinking.model.grouped_experts import RowOrder, sum_of_rows

ExpertNetworks = Callable[[Tensor, Tensor, Tensor], Tensor]
"""An experts module with this rank's share: latents [R, L], experts [R, 1] from 0 on, gates [R, 1] → [R, L]."""


class ExpertExchange:
    """Takes the place of an experts module's call on the ranks of `group`, of which rank g has experts g·E/G onward."""

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        self.group, self.experts, self.own = group, experts, experts // group.size()

    def __call__(self, experts: ExpertNetworks, x_TL: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Latents [T, L], experts [T, K] int64 of all E, gates [T, K] fp32 → Σ_k gate · expert(latent), [T, L].
        Collective, also where there is no gradient. RunError if what it receives does not fit into memory."""
        return self._there_and_back(experts, x_TL, chosen_TK, gates_TK)

    # The sizes depend on the data, so that this is no graph; what it calls is compiled by itself.
    @torch.compiler.disable(recursive=False)
    def _there_and_back(self, experts: ExpertNetworks, x_TL: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        order = RowOrder.of(chosen_TK, self.experts)
        sent_E = torch.diff(order.ends_E, prepend=order.ends_E.new_zeros(1))
        received_GE = all_to_all_single(sent_E, None, None, self.group).view(-1, self.own)
        totals = torch.stack((sent_E.view(-1, self.own).sum(dim=1), received_GE.sum(dim=1)))
        sent, received = totals.tolist()  # the one place where the host waits
        x_SL = _Spread.apply(x_TL, order)
        try:
            x_RL = all_to_all_single_autograd(x_SL, received, sent, self.group)
            y_RL = self._own_experts(experts, x_RL, received_GE)
            y_SL = all_to_all_single_autograd(y_RL, sent, received, self.group)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"out of memory with {sum(received):,} rows for this rank's {self.own} experts, "
                f"{sum(received) / max(1, sum(sent)):.1f} times what it sends: a smaller batch.micro_batch_size, or a "
                f"larger model.router_aux_loss_coef against uneven routing ({str(error).splitlines()[0][:120]})"
            ) from error
        return _Combine.apply(y_SL, gates_TK, order)

    def _own_experts(self, experts: ExpertNetworks, x_RL: Tensor, received_GE: Tensor) -> Tensor:
        """Rows come rank by rank, and of a rank expert by expert."""
        rows = x_RL.size(0)
        if not rows:  # whoever shares the weights expects a gradient of them
            return experts(x_RL.new_zeros(1, x_RL.size(1)), *_alone(received_GE.new_zeros(1)))[:0] + x_RL
        expert_GE = torch.arange(self.own, device=x_RL.device).expand_as(received_GE)
        expert_R = expert_GE.flatten().repeat_interleave(received_GE.flatten(), output_size=rows)
        return experts(x_RL, *_alone(expert_R))


def _alone(expert_R: Tensor) -> tuple[Tensor, Tensor]:
    """One expert a row, weighed with 1."""
    expert_R1 = expert_R.long()[:, None]
    return expert_R1, torch.ones_like(expert_R1, dtype=torch.float32)


class _Spread(torch.autograd.Function):
    """Each token's row to all its places. Autograd's own gradient would add up in any order."""

    @staticmethod
    def forward(ctx: Any, x_TL: Tensor, order: RowOrder) -> Tensor:
        ctx.save_for_backward(order.row_TK)
        return x_TL.index_select(0, order.pair_S // order.row_TK.size(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_SL: Tensor) -> tuple[Tensor | None, ...]:
        (row_TK,) = ctx.saved_tensors
        return sum_of_rows(dx_SL, row_TK, torch.ones_like(row_TK)).to(dx_SL.dtype), None


class _Combine(torch.autograd.Function):
    """Σ_k gate · y in fp32, each token's rows gathered back."""

    @staticmethod
    def forward(ctx: Any, y_SL: Tensor, gates_TK: Tensor, order: RowOrder) -> Tensor:
        ctx.save_for_backward(y_SL, gates_TK, order.pair_S, order.row_TK)
        return sum_of_rows(y_SL, order.row_TK, gates_TK).to(y_SL.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TL: Tensor) -> tuple[Tensor | None, ...]:
        y_SL, gates_TK, pair_S, row_TK = ctx.saved_tensors
        dout_SL = dout_TL.index_select(0, pair_S // gates_TK.size(1)).float()
        dy_SL = dout_SL * gates_TK.float().flatten()[pair_S, None]
        dgates_TK = (dout_SL * y_SL.float()).sum(dim=-1)[row_TK]
        return dy_SL.to(y_SL.dtype), dgates_TK.to(gates_TK.dtype), None
