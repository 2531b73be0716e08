"""Experts divided over two ranks, in 1, 2, 4 and 8 groups: over this machine's memory, and over a link that takes time
but no core, as a network card's does."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mai_thinking.bench.measure import Figure, Result, Row, alternate, milliseconds, ratio
from mai_thinking.model import MaiThinkingConfig, expert_parallel
from mai_thinking.model.latent_moe import Experts

RANKS, GROUPS = 2, (1, 2, 4, 8)
MEMORY = "this machine's memory"
NOTES = [
    "to 1 group: how many times as fast",
    "predicted: from the time over memory with as many groups, and the link's rate",
]


class Sizes(NamedTuple):
    """A layer, a rank's tokens, and the link's bytes per second."""

    experts: int = 64
    top_k: int = 8
    latent: int = 256
    inner: int = 384
    tokens: int = 1024
    rate: float = 50e6


class Link:
    """Carries rows of experts at `rate` bytes per second, one journey behind the other."""

    def __init__(self, rate: float) -> None:
        self._rate, self._line, self._hand_over = rate, ThreadPoolExecutor(1), dist.all_to_all_single

    def all_to_all_single(self, to: Tensor, rows: Tensor, incoming: Any = None, outgoing: Any = None, *rest: Any, **how: Any) -> Any:  # noqa: E501  # fmt: skip
        """As the function of this name; but rows that leave this rank are there when the link has carried them."""
        work = self._hand_over(to, rows, incoming, outgoing, *rest, **how)
        if not how.get("async_op"):
            return work
        leaving = sum(outgoing) - outgoing[dist.get_rank()]
        carried = self._line.submit(self._carry, work, leaving * rows.size(1) * rows.itemsize / self._rate)
        return SimpleNamespace(wait=carried.result)

    @staticmethod
    def _carry(work: dist.Work, seconds: float) -> None:
        time.sleep(seconds)
        work.wait()


def measure(model: Path, rounds: int) -> Result:
    """A layer's experts forward and backward, 64 experts, top 8, latent 256, inner 384, 1,024 tokens a rank."""
    return compare(Sizes(), rounds)


def compare(sizes: Sizes, rounds: int) -> Result:
    """Rank 0's times."""
    with TemporaryDirectory() as folder, ProcessPoolExecutor(RANKS, get_context("spawn")) as ranks:
        arguments = sizes, rounds, f"{folder}/meeting"
        results = [ranks.submit(_as_rank, rank, *arguments) for rank in range(RANKS)]
        return next(result.result() for result in results)


def _as_rank(rank: int, sizes: Sizes, rounds: int, meeting: str) -> Result:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    world = dist.group.WORLD
    assert world is not None
    draw = torch.Generator().manual_seed(rank)
    config = MaiThinkingConfig(
        num_experts=sizes.experts // RANKS,
        num_experts_per_tok=sizes.top_k,
        latent_size=sizes.latent,
        moe_intermediate_size=sizes.inner,
    )
    config._experts_implementation = "bucketed_mm"
    experts = Experts(config)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.05, generator=draw)
    chosen_TK = torch.rand(sizes.tokens, sizes.experts, generator=draw).topk(sizes.top_k).indices
    gates_TK = torch.rand(sizes.tokens, sizes.top_k, generator=draw)
    x_TL, dout_TL = (torch.randn(sizes.tokens, sizes.latent, generator=draw) for _ in range(2))
    exchanges = {}
    for groups in GROUPS:
        with mock.patch.object(expert_parallel, "GROUPS", groups):
            exchanges[groups] = expert_parallel.ExpertExchange(world, sizes.experts, x_TL.device)

    def train(groups: int, hand_over: Callable[..., Any]) -> None:
        experts.zero_grad(set_to_none=True)
        experts.exchange = exchanges[groups]
        dist.barrier()
        with mock.patch.object(dist, "all_to_all_single", hand_over):
            experts(x_TL.requires_grad_(), chosen_TK, gates_TK.requires_grad_()).backward(dout_TL)

    hand_over: Callable[..., Any] = dist.all_to_all_single
    ways = {MEMORY: hand_over, f"{sizes.rate / 1e6:.0f} MB/s": Link(sizes.rate).all_to_all_single}
    cases = list(product(ways, GROUPS))
    sides = {f"{way} {groups}": partial(train, groups, ways[way]) for way, groups in cases}
    turns = alternate(sides, rounds=rounds, warmup=2)
    leaving = float((chosen_TK // (sizes.experts // RANKS) != rank).sum()) * sizes.latent * x_TL.itemsize
    rows = []
    for way, groups in cases:
        taken = turns[f"{way} {groups}"]
        figures = {"time": milliseconds(taken), "to 1 group": ratio(turns[f"{way} 1"], taken)}
        if way != MEMORY:
            products = milliseconds(turns[f"{MEMORY} {groups}"]).median
            figures["predicted"] = Figure.of([predicted(products, 1e3 * leaving / sizes.rate, groups)], "ms")
        rows.append(Row({"rows travel over": way, "groups": groups}, figures))
    dist.destroy_process_group()
    return Result(rows, NOTES)


def predicted(compute: float, journey: float, groups: int) -> float:
    """How long a forward and a backward pass take whose products take `compute` and whose rows take `journey` on each
    of four ways, if nothing else takes time and groups are equal."""
    whole = 0.0
    for products in (compute / 3, compute * 2 / 3):  # the backward pass has twice the forward's
        link, done = journey, 0.0  # all groups' rows leave at once, one behind the other
        for group in range(1, groups + 1):
            done = max(done, journey * group / groups) + products / groups
            link = max(link, done) + journey / groups
        whole += link
    return whole
