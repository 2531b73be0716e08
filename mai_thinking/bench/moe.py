"""LatentMoE's experts on a CPU: ours against the library's, in training and in decoding."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mai_thinking.bench.machine import Options
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure, Side, alternate, fastest, milliseconds, ratio
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.experts import bucketed_experts
from mai_thinking.model.latent_moe import Experts

DECODING, TRAINING = "forward", "forward + backward"
PEERS = {DECODING: ("grouped_mm", "batched_mm"), TRAINING: ("grouped_mm",)}
"""Those that have a chance: `eager` takes many times as long, and `batched_mm` copies an expert for each token."""


def measure(options: Options) -> Result:
    """512 experts, top 8, latent 64, inner 96; training at 512 and 4,096 tokens, decoding at 1 to 64."""
    cases = [(DECODING, tokens) for tokens in (1, 4, 16, 64)] + [(TRAINING, tokens) for tokens in (512, 4096)]
    bench = Layer(experts=512, top_k=8, latent=64, inner=96)
    note = (
        "ratio: the fastest peer's time over ours. arithmetic: its FLOPs at the ceiling's best product. weights: "
        "the chosen experts' read once, in training read twice and their gradients written, at its best copy."
    )
    return Result("moe", [bench.compare(what, tokens, options) for what, tokens in cases], [note])


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

    def compare(self, what: str, tokens: int, options: Options) -> Row:
        """Ours and the peers, `what` at `tokens` tokens."""
        draw = torch.Generator().manual_seed(tokens)
        chosen_TK = torch.rand(tokens, self.experts, generator=draw).topk(self.top_k).indices
        gates_TK = torch.rand(tokens, self.top_k, generator=draw).softmax(-1)
        x_TL, dout_TL = (torch.randn(tokens, self.latent, generator=draw) for _ in range(2))
        inputs = (x_TL, chosen_TK, gates_TK)
        sides = {"ours": self._side(lambda *tensors: bucketed_experts(self.ours, *tensors), what, inputs, dout_TL)}
        sides |= {name: self._side(self._peer(name), what, inputs, dout_TL) for name in PEERS[what]}
        return self._row(what, chosen_TK, sides, options)

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
