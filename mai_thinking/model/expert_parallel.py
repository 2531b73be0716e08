"""Experts divided over ranks: rows travel to the rank that has their expert, and what it makes of them travels back.

    at home       each token's row K times, sorted by group of experts, owner and expert:  e0 e0 e4 | e1 e5 e5 | …
    counts        how many rows of each expert go where: all-to-all
    rows          to their owners: all-to-all
    there         each through its expert, like a token that chose one expert and weighs it with 1
    rows          back home: all-to-all
    at home       Σ_k gate · row

Each rank's experts are cut into groups, and each group's rows travel by themselves: while one group is computed, the
next one's rows arrive and the last one's return. So the links work beside the products, but for the first journey out
and the last one home:

    links        out 0   out 1   out 2   home 0   home 1   home 2
    products             group 0   group 1   group 2

A tensor that is still on its way is handed from one autograd function to the next, and the second waits for it. Their
backward passes mirror this, and autograd takes what was done last first: gradients travel in the groups' reverse order,
beside the products of the groups before. The order is the same on all ranks, as collectives need it.

No row is dropped. Routers and gates stay where the token is. MAI-Thinking-1 report §2.8.

Shapes: T tokens, K chosen experts per token, S = T·K rows that a rank sends, R rows that it receives for one group of
experts, G ranks that divide the experts, E experts, L latent size.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mai_thinking.errors import RunError
from mai_thinking.model.grouped_experts import RowOrder, sum_of_rows

GROUPS = 4
"""Of a rank's experts. With n, an n-th of the rows travels while nothing is computed; beyond 4 little is left to win,
and products get small (results/bench/exchange.txt)."""
Networks = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Latents [R, L], a group's weights [e, 2F, L] and [e, L, F], gates [R, 1], experts [R, 1] from 0 on → [R, L]."""


class ExpertExchange:
    """Takes the place of an experts module's product on the ranks of `group`, of which rank g has experts g·E/G on."""

    def __init__(self, group: dist.ProcessGroup, experts: int, device: torch.device) -> None:
        own = experts // group.size()
        self.group, self.experts, self.own = group, experts, own
        self.sizes = [len(part) for part in torch.arange(own).tensor_split(min(own, GROUPS))]
        by_rank = torch.arange(experts, device=device).view(group.size(), own)
        travelling_E = torch.cat([part.flatten() for part in by_rank.split(self.sizes, dim=1)])
        self.place_E = travelling_E.argsort()
        """Each expert's place in the order in which rows travel."""

    # The sizes depend on the data, so that this is no graph.
    @torch.compiler.disable
    def __call__(
        self, networks: Networks, x_TL: Tensor, w_gate_up: Tensor, w_down: Tensor, gates_TK: Tensor, chosen_TK: Tensor
    ) -> Tensor:
        """Latents [T, L], this rank's weights, gates [T, K] fp32, experts [T, K] int64 of all E → Σ_k gate · expert(x),
        [T, L]. Collective, also where there is no gradient. RunError if what it receives does not fit into memory."""
        order = RowOrder.of(self.place_E[chosen_TK], self.experts)
        sent_E = torch.diff(order.ends_E, prepend=order.ends_E.new_zeros(1))[self.place_E]
        received_E = torch.empty_like(sent_E)
        dist.all_to_all_single(received_E, sent_E, group=self.group)
        counts = torch.stack((sent_E, received_E)).view(2, -1, self.own).split(self.sizes, dim=2)
        totals = torch.stack([count.sum(dim=2) for count in counts])
        journeys = Journeys(self.group, totals.tolist())  # the one place where the host waits
        try:
            x_RL = _Leave.apply(x_TL, order, journeys)
            weights = zip(w_gate_up.split(self.sizes), w_down.split(self.sizes), strict=True)
            y_RL = []
            for number, group_weights in enumerate(weights):
                # What arrives forth leaves back, and the other way round.
                arrive, go_home = partial(journeys.arrive, number), partial(journeys.go_home, number)
                arrived_RL = _Passing.apply(x_RL[number], arrive, go_home)
                product_RL = _group(networks, arrived_RL, *group_weights, counts[number][1])
                y_RL.append(_Passing.apply(product_RL, go_home, arrive))
            return _Combine.apply(gates_TK, order, journeys, *y_RL)
        except torch.OutOfMemoryError as error:
            sent, received = totals.sum(dim=(0, 2)).tolist()
            raise RunError(
                f"out of memory with {received:,} rows for this rank's {self.own} experts, "
                f"{received / max(1, sent):.1f} times what it sends: a smaller batch.micro_batch_size, or a "
                f"larger model.router_aux_loss_coef against uneven routing ({str(error).splitlines()[0][:120]})"
            ) from error


def _group(networks: Networks, x_RL: Tensor, w_gate_up: Tensor, w_down: Tensor, received_Ge: Tensor) -> Tensor:
    """One group's product. Rows come rank by rank, and of a rank expert by expert."""
    rows = x_RL.size(0)
    if rows:
        expert_Ge = torch.arange(received_Ge.size(1), device=x_RL.device).expand_as(received_Ge)
        expert_R = expert_Ge.flatten().repeat_interleave(received_Ge.flatten(), output_size=rows)
    else:  # whoever shares the weights expects a gradient of them
        expert_R = received_Ge.new_zeros(1)
    expert_R1 = expert_R.long()[:, None]
    given = x_RL if rows else x_RL.new_zeros(1, x_RL.size(1))
    y_RL = networks(given, w_gate_up, w_down, torch.ones_like(expert_R1, dtype=torch.float32), expert_R1)
    return y_RL if rows else y_RL[:0] + x_RL


class Journeys:
    """One layer's rows on their way: of each group, how many this rank sends to each other and receives from it."""

    def __init__(self, group: dist.ProcessGroup, splits: list[tuple[list[int], list[int]]]) -> None:
        self._group, self._splits = group, splits
        self.numbers = range(len(splits))
        self._at_home = [sum(sent) for sent, _ in splits]
        self._works: dict[int, dist.Work] = {}
        self._home_SL: Tensor | None = None

    def leave(self, rows_SL: Tensor, numbers: Iterable[int]) -> tuple[Tensor, ...]:
        """Begin to send rows to their owners, in the order of `numbers`. → what arrives of each group, [R, L]."""
        arriving = [rows_SL.new_empty(sum(received), rows_SL.size(1)) for _, received in self._splits]
        parts = rows_SL.split(self._at_home)
        for number in numbers:
            sent, received = self._splits[number]
            self._start(number, arriving[number], parts[number], received, sent)
        return tuple(arriving)

    def arrive(self, number: int, _: Tensor | None = None) -> None:
        """Wait until a group's rows are there. A GPU waits, the host does not."""
        self._works.pop(number).wait()

    def go_home(self, number: int, rows_RL: Tensor) -> None:
        """Begin to send a group's rows back."""
        if self._home_SL is None:
            self._home_SL = rows_RL.new_empty(sum(self._at_home), rows_RL.size(1))
        sent, received = self._splits[number]
        self._start(number, self._home_SL.split(self._at_home)[number], rows_RL.contiguous(), sent, received)

    def at_home(self) -> Tensor:
        """All groups' rows [S, L], once they are back."""
        for number in list(self._works):
            self.arrive(number)
        home_SL, self._home_SL = self._home_SL, None
        assert home_SL is not None
        return home_SL

    def _start(self, number: int, to: Tensor, rows: Tensor, incoming: list[int], outgoing: list[int]) -> None:
        work = dist.all_to_all_single(to, rows, incoming, outgoing, self._group, async_op=True)
        assert work is not None
        self._works[number] = work


class _Leave(torch.autograd.Function):
    """Each token's row to all its places, and on their way. → a tensor for each group, to be waited for. Backward, the
    gradients have come home. Autograd's own would add them up in any order."""

    @staticmethod
    def forward(ctx: Any, x_TL: Tensor, order: RowOrder, journeys: Journeys) -> tuple[Tensor, ...]:
        ctx.save_for_backward(order.row_TK)
        ctx.journeys = journeys
        return journeys.leave(x_TL.index_select(0, order.pair_S // order.row_TK.size(1)), journeys.numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dx_RL: Tensor) -> tuple[Tensor | None, ...]:
        (row_TK,) = ctx.saved_tensors
        dx_SL = ctx.journeys.at_home()
        return sum_of_rows(dx_SL, row_TK, torch.ones_like(row_TK)).to(dx_SL.dtype), None, None


class _Passing(torch.autograd.Function):
    """Hands one group's rows on: `forth` is called with them, and backward `back` with their gradient."""

    @staticmethod
    def forward(ctx: Any, rows_RL: Tensor, forth: Callable[[Tensor], None], back: Callable[[Tensor], None]) -> Tensor:
        ctx.back = back
        forth(rows_RL)
        return rows_RL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_RL: Tensor) -> tuple[Tensor | None, ...]:
        ctx.back(d_RL)
        return d_RL, None, None


class _Combine(torch.autograd.Function):
    """Σ_k gate · y in fp32, each token's rows gathered back; backward, the rows' gradients leave, last group first."""

    @staticmethod
    def forward(ctx: Any, gates_TK: Tensor, order: RowOrder, journeys: Journeys, *y_RL: Tensor) -> Tensor:
        y_SL = journeys.at_home()
        ctx.save_for_backward(y_SL, gates_TK, order.pair_S, order.row_TK)
        ctx.journeys = journeys
        return sum_of_rows(y_SL, order.row_TK, gates_TK).to(y_SL.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TL: Tensor) -> tuple[Tensor | None, ...]:
        y_SL, gates_TK, pair_S, row_TK = ctx.saved_tensors
        dout_SL = dout_TL.index_select(0, pair_S // gates_TK.size(1)).float()
        dy_SL = (dout_SL * gates_TK.float().flatten()[pair_S, None]).to(y_SL.dtype)
        dy_RL = ctx.journeys.leave(dy_SL, reversed(ctx.journeys.numbers))
        dgates_TK = (dout_SL * y_SL.float()).sum(dim=-1)[row_TK]
        return dgates_TK.to(gates_TK.dtype), None, None, *dy_RL
