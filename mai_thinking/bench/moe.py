"""LatentMoE's experts on a CPU: ours against the library's, in training and in decoding."""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mai_thinking.bench.apart import Apart
from mai_thinking.bench.options import Options
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure, Side, Turn, alternate, fastest, ratio
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.latent_moe import Experts

PEERS = ("grouped_mm", "batched_mm", "eager")
DECODING, TRAINING = "forward", "forward + backward"
LARGEST_COPY = 2**30
"""Bytes of weights that `batched_mm`, which copies an expert's for each token that it works on, may copy."""
DECODING_CALLS = 20
"""Of a turn, each with choices of its own, as in decoding: no call finds its experts in the cache because the last had
the same ones."""
HOPELESS = 4.0
"""Times as long as the fastest peer: such a peer does not take part in the rounds."""


SIDES = ("ours", *PEERS)


class Sizes(NamedTuple):
    """Of a layer's experts."""

    experts: int
    top_k: int
    latent: int
    inner: int

    @property
    def weights_an_expert(self) -> int:
        """SwiGLU: gate, up and down."""
        return 3 * self.latent * self.inner


def measure(options: Options) -> Result:
    """512 experts, top 8, latent 64, inner 96; training at 512 and 4,096 tokens, decoding at 1 to 64."""
    sizes = Sizes(experts=512, top_k=8, latent=64, inner=96)
    cases = [(DECODING, tokens) for tokens in (1, 4, 16, 64)] + [(TRAINING, tokens) for tokens in (512, 4096)]
    rows = []
    notes = [
        "ratio: the fastest peer's time over ours, each in its own process. arithmetic: its FLOPs at the ceiling's "
        "best product. weights: the chosen experts' read once, in training read twice and their gradients written, at "
        "its best copy."
    ]
    with ExitStack() as stack:
        apart = {name: stack.enter_context(Apart(make_side)) for name in SIDES}
        for what, tokens in cases:
            makers = {name: partial(apart[name].make, name, sizes, what, tokens) for name in SIDES}
            row, left_out = compare(makers, sizes, what, tokens, options)
            rows.append(row)
            notes += left_out
    return Result("moe", rows, notes)


def compare(
    makers: Mapping[str, Callable[[], Side]], sizes: Sizes, what: str, tokens: int, options: Options
) -> tuple[Row, list[str]]:
    """Ours and every peer that has a chance, `what` at `tokens` tokens; and a note on each that has none."""
    chosen_TK, *_ = inputs(sizes, tokens)
    sides = {"ours": makers["ours"]()}
    left_out = []
    copied = 4 * chosen_TK.numel() * sizes.weights_an_expert
    tried: dict[str, float] = {}
    for name in PEERS:
        if name == "batched_mm" and copied > LARGEST_COPY:
            left_out.append(f"{tokens} tokens: {name} left out, it would copy {copied / 2**30:.1f} GiB of weights")
            continue
        side = makers[name]()
        tried[name] = _seconds(side, enough=HOPELESS * min(tried.values(), default=float("inf")))
        sides[name] = side
    for name, seconds in tried.items():
        if seconds > HOPELESS * min(tried.values()):
            left_out.append(f"{tokens} tokens: {name} left out, it took {1e3 * seconds:.3g} ms when tried")
            del sides[name]
    turns = alternate(sides, rounds=options.rounds, warmup=3)
    options.ceiling.sample(rounds=2)
    best = fastest({name: taken for name, taken in turns.items() if name != "ours"})
    passes, traffic = (3, 3) if what == TRAINING else (1, 1)
    flops = 2 * passes * chosen_TK.numel() * sizes.weights_an_expert
    moved = 4 * traffic * chosen_TK.unique().numel() * sizes.weights_an_expert
    figures = {
        "ours": _milliseconds(turns["ours"]),
        "peer": _milliseconds(turns[best]),
        "ratio": ratio(turns[best], turns["ours"]),
        "arithmetic": Figure.of([options.ceiling.product_milliseconds(flops)], "ms"),
        "weights": Figure.of([options.ceiling.copy_milliseconds(moved)], "ms"),
    }
    return Row({"pass": what, "tokens": tokens, "fastest peer": best}, figures), left_out


def inputs(sizes: Sizes, tokens: int, number: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choices [T, K], gates [T, K], latents and output gradients [T, L], number `number` of many."""
    draw = torch.Generator().manual_seed(1000 * tokens + number)
    chosen_TK = torch.rand(tokens, sizes.experts, generator=draw).topk(sizes.top_k).indices
    gates_TK = torch.rand(tokens, sizes.top_k, generator=draw).softmax(-1)
    x_TL, dout_TL = (torch.randn(tokens, sizes.latent, generator=draw) for _ in range(2))
    return chosen_TK, gates_TK, x_TL, dout_TL


def make_side(name: str, sizes: Sizes, what: str, tokens: int) -> Side:
    """`what` at `tokens` tokens, computed by one of `SIDES`; how often."""
    compute = layer(name, sizes)
    weights = list(compute.parameters())
    steps = [inputs(sizes, tokens, number) for number in range(DECODING_CALLS)]
    chosen_TK, gates_TK, x_TL, dout_TL = steps[0]

    def decode() -> float:
        with torch.inference_mode():
            for chosen_TK, gates_TK, x_TL, _ in steps:
                compute(x_TL, chosen_TK, gates_TK)
        return len(steps)

    def train() -> None:
        for weight in weights:
            weight.grad = None
        x, gates = x_TL.detach().requires_grad_(), gates_TK.detach().requires_grad_()
        compute(x, chosen_TK, gates).backward(dout_TL)

    return train if what == TRAINING else decode


@functools.cache
def layer(name: str, sizes: Sizes) -> nn.Module:
    """Experts of one of `SIDES`; the weights of all are the same. The peers' are the library's own module."""
    common = {"num_experts": sizes.experts, "moe_intermediate_size": sizes.inner, "num_experts_per_tok": sizes.top_k}
    config: Any
    module: nn.Module
    if name == "ours":
        config = MaiThinkingConfig(**common, latent_size=sizes.latent)
        module = Experts(config)
    else:
        config = Qwen3MoeConfig(**common, hidden_size=sizes.latent, hidden_act="silu")
        module = Qwen3MoeExperts(config)
    config._experts_implementation = "bucketed_mm" if name == "ours" else name
    draw = torch.Generator().manual_seed(0)
    for _, weight in sorted(module.named_parameters()):
        nn.init.normal_(weight, std=0.05, generator=draw)
    return module


def _seconds(side: Side, *, enough: float) -> float:
    """Of the better of two goes; one is enough for a side that takes more than twice as long as `enough`."""
    taken: list[float] = []
    while len(taken) < 2 and (not taken or taken[0] < 2 * enough):
        (turn,) = alternate({"": side}, rounds=1, warmup=0)[""]
        taken.append(turn.seconds / turn.amount)
    return min(taken)


def _milliseconds(turns: Iterable[Turn]) -> Figure:
    """Of one call."""
    return Figure.of((1e3 * turn.seconds / turn.amount for turn in turns), "ms")
