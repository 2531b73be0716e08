"""LatentMoE's experts on a CPU: ours against the library's, in training and in decoding."""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mai_thinking.bench.measure import Result, Row, alternate, milliseconds, ratio
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.experts import bucketed_experts
from mai_thinking.model.latent_moe import Experts

DECODING, TRAINING = "forward", "forward + backward"
PEERS = {DECODING: ("grouped_mm", "batched_mm"), TRAINING: ("grouped_mm",)}
"""Those that have a chance: `eager` takes many times as long, and `batched_mm` copies an expert for each token."""


def measure(model: Path, rounds: int) -> Result:
    """512 experts, top 8, latent 64, inner 96; training at 512 and 4,096 tokens, decoding at 1 to 64."""
    cases = [(DECODING, tokens) for tokens in (1, 4, 16, 64)] + [(TRAINING, tokens) for tokens in (512, 4096)]
    layer = Layer(experts=512, top_k=8, latent=64, inner=96)
    return Result(
        [layer.compare(what, tokens, rounds) for what, tokens in cases], ["ratio: the fastest peer's over ours"]
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

    def compute(self, side: str, x_TL: torch.Tensor, chosen_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """[T, L] by `ours`, or by a function of the library's."""
        if side == "ours":
            return bucketed_experts(self.ours, x_TL, chosen_TK, gates_TK)
        self.library.config._experts_implementation = side
        out: torch.Tensor = self.library(x_TL, chosen_TK, gates_TK)
        return out

    def compare(self, what: str, tokens: int, rounds: int) -> Row:
        """Ours and the peers, `what` at `tokens` tokens."""
        draw = torch.Generator().manual_seed(tokens)
        chosen_TK = torch.rand(tokens, self.experts, generator=draw).topk(self.top_k).indices
        gates_TK = torch.rand(tokens, self.top_k, generator=draw).softmax(-1)
        x_TL, dout_TL = (torch.randn(tokens, self.latent, generator=draw) for _ in range(2))

        def decode(side: str) -> None:
            with torch.inference_mode():
                self.compute(side, x_TL, chosen_TK, gates_TK)

        def train(side: str) -> None:
            self.ours.zero_grad(set_to_none=True)
            x, gates = x_TL.detach().requires_grad_(), gates_TK.detach().requires_grad_()
            self.compute(side, x, chosen_TK, gates).backward(dout_TL)

        work = train if what == TRAINING else decode
        turns = alternate({side: partial(work, side) for side in ("ours", *PEERS[what])}, rounds=rounds, warmup=3)
        times = {side: milliseconds(taken) for side, taken in turns.items()}
        best = min(PEERS[what], key=lambda peer: times[peer].median)
        return Row(
            {"pass": what, "tokens": tokens, "fastest peer": best},
            {"ours": times["ours"], "peer": times[best], "ratio": ratio(turns[best], turns["ours"])},
        )
