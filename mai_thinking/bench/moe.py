"""LatentMoE's experts on a CPU: ours against the library's, in training and in decoding."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mai_thinking.bench.options import Options
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure, Side, alternate, fastest, milliseconds, ratio
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.experts import bucketed_experts
from mai_thinking.model.latent_moe import Experts

PEERS = ("grouped_mm", "batched_mm", "eager")
DECODING, TRAINING = "forward", "forward + backward"
LARGEST_COPY = 2**30
"""Bytes of weights that `batched_mm`, which copies an expert's for each token that it works on, may copy."""
HOPELESS = 4.0
"""Times as long as the fastest peer: such a peer does not take part in the rounds."""


def measure(options: Options) -> Result:
    """512 experts, top 8, latent 64, inner 96; training at 512 and 4,096 tokens, decoding at 1 to 64."""
    cases = [(DECODING, tokens) for tokens in (1, 4, 16, 64)] + [(TRAINING, tokens) for tokens in (512, 4096)]
    bench = Layer(experts=512, top_k=8, latent=64, inner=96)
    rows, notes = [], []
    for what, tokens in cases:
        row, left_out = bench.compare(what, tokens, options)
        rows.append(row)
        notes += left_out
    return Result(
        "moe",
        rows,
        [
            "ratio: the fastest peer's time over ours. arithmetic: its FLOPs at the ceiling's best product. weights: "
            "the chosen experts' read once, in training read twice and their gradients written, at its best copy.",
            *notes,
        ],
    )


class Layer:
    """One layer's experts, whose weights ours and the library's share."""

    def __init__(self, *, experts: int, top_k: int, latent: int, inner: int) -> None:
        torch.manual_seed(0)
        self.experts, self.top_k, self.latent = experts, top_k, latent
        sizes = {"num_experts": experts, "moe_intermediate_size": inner}
        self.ours = Experts(MaiThinkingConfig(**sizes, latent_size=latent, num_experts_per_tok=top_k))
        for weight in self.ours.parameters():
            nn.init.normal_(weight, std=0.05)
        self.library = Qwen3MoeExperts(Qwen3MoeConfig(**sizes, hidden_size=latent, hidden_act="silu"))
        self.library.gate_up_proj, self.library.down_proj = self.ours.gate_up_proj, self.ours.down_proj
        self.weights_an_expert = sum(weight[0].numel() for weight in self.ours.parameters())

    def compare(self, what: str, tokens: int, options: Options) -> tuple[Row, list[str]]:
        """Ours and every peer that has a chance, `what` at `tokens` tokens; and a note on each that has none."""
        draw = torch.Generator().manual_seed(tokens)
        chosen_TK = torch.rand(tokens, self.experts, generator=draw).topk(self.top_k).indices
        gates_TK = torch.rand(tokens, self.top_k, generator=draw).softmax(-1)
        x_TL, dout_TL = (torch.randn(tokens, self.latent, generator=draw) for _ in range(2))
        inputs = (x_TL, chosen_TK, gates_TK)
        sides = {"ours": self._side(lambda *tensors: bucketed_experts(self.ours, *tensors), what, inputs, dout_TL)}
        left_out = []
        peers = {name: self._side(self._peer(name), what, inputs, dout_TL) for name in PEERS}
        copied = 4 * chosen_TK.numel() * self.weights_an_expert
        if copied > LARGEST_COPY:
            del peers["batched_mm"]
            left_out.append(f"{tokens} tokens: batched_mm left out, it would copy {copied / 2**30:.1f} GiB of weights")
        tried: dict[str, float] = {}
        for name, side in peers.items():
            tried[name] = _seconds(side, enough=HOPELESS * min(tried.values(), default=float("inf")))
        for name, seconds in tried.items():
            if seconds > HOPELESS * min(tried.values()):
                left_out.append(f"{tokens} tokens: {name} left out, it took {1e3 * seconds:.3g} ms when tried")
            else:
                sides[name] = peers[name]
        return self._row(what, chosen_TK, sides, options), left_out

    def _row(self, what: str, chosen_TK: torch.Tensor, sides: Mapping[str, Side], options: Options) -> Row:
        turns = alternate(sides, rounds=options.rounds, warmup=3)
        options.ceiling.sample(rounds=2)
        best = fastest({name: taken for name, taken in turns.items() if name != "ours"})
        passes, traffic = (3, 3) if what == TRAINING else (1, 1)
        arithmetic = options.ceiling.product_milliseconds(2 * passes * chosen_TK.numel() * self.weights_an_expert)
        moved = 4 * traffic * chosen_TK.unique().numel() * self.weights_an_expert
        return Row(
            {"pass": what, "tokens": chosen_TK.size(0), "fastest peer": best},
            {
                "ours": milliseconds(turns["ours"]),
                "peer": milliseconds(turns[best]),
                "ratio": ratio(turns[best], turns["ours"]),
                "arithmetic": Figure.of([arithmetic], "ms"),
                "weights": Figure.of([options.ceiling.copy_milliseconds(moved)], "ms"),
            },
        )

    def _peer(self, name: str) -> Callable[..., torch.Tensor]:
        def compute(*inputs: torch.Tensor) -> torch.Tensor:
            self.library.config._experts_implementation = name
            out: torch.Tensor = self.library(*inputs)
            return out

        return compute

    def _side(
        self,
        compute: Callable[..., torch.Tensor],
        what: str,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        dout_TL: torch.Tensor,
    ) -> Side:
        x_TL, chosen_TK, gates_TK = inputs

        def decode() -> None:
            with torch.inference_mode():
                compute(x_TL, chosen_TK, gates_TK)

        def train() -> None:
            self.ours.zero_grad(set_to_none=True)
            x, gates = x_TL.detach().requires_grad_(), gates_TK.detach().requires_grad_()
            compute(x, chosen_TK, gates).backward(dout_TL)

        return train if what == TRAINING else decode


def _seconds(side: Side, *, enough: float) -> float:
    """Of the better of two goes; one is enough for a side that takes more than twice as long as `enough`."""
    taken: list[float] = []
    while len(taken) < 2 and (not taken or taken[0] < 2 * enough):
        begin = time.perf_counter()
        side()
        taken.append(time.perf_counter() - begin)
    return min(taken)
