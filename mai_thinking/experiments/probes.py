"""Architectures that are asked about and not part of the recipe: small changes of the model or the learner, for the
length of a run. A ladder's variant names one as its `probe`; nothing else can set them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from mai_thinking.config.ladder import Probe
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.latent_moe import LatentMoE, Router, Routing, stable_top_k
from mai_thinking.model.norm import RMSNorm
from mai_thinking.training.learner import Learner

BIAS_STEP = 1e-3
"""How far a router's bias moves in a step, as in auxiliary-loss-free balancing (arXiv 2408.15664)."""


class LatentNorm(LatentMoE):
    """A norm inside the latent path, before the experts; a gain for each of the latent's dimensions more."""

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__(config)
        self.latent_norm = RMSNorm(config.latent_size, config.rms_norm_eps)
        # A hook, so that the projection keeps its name and with it the first weights of its pair.
        self.latent_down.register_forward_hook(lambda module, inputs, output: self.latent_norm(output))


class SharedExpert(LatentMoE):
    """One of a token's experts is the same for all tokens, so that what is active stays as it is."""

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__(config)
        self.router.top_k -= 1
        self.shared_in = nn.Linear(config.latent_size, 2 * config.moe_intermediate_size, bias=False)
        self.shared_out = nn.Linear(config.moe_intermediate_size, config.latent_size, bias=False)

    def forward(self, x_BTD: torch.Tensor, *rest: Any, **named: Any) -> tuple[torch.Tensor, Routing, torch.Tensor]:
        """As `LatentMoE`; the shared expert has the weight of a mean chosen one."""
        out_BTD, routing, chosen_BTK = super().forward(x_BTD, *rest, **named)
        gate, up = self.shared_in(self.latent_down(x_BTD)).chunk(2, dim=-1)
        shared_BTL = self.shared_out(nn.functional.silu(gate) * up) / self.router.top_k
        return out_BTD + self.latent_up(shared_BTL), routing, chosen_BTK


class BiasRouter(Router):
    """Experts are chosen by probability plus a bias, which falls for those with more than their share and rises for the
    others; gates are the probabilities still. Without a balance loss: set `router_aux_loss_coef: 0`."""

    bias: torch.Tensor

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__(config)
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(
        self, x_TD: torch.Tensor, chosen_TK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `Router`; in training the bias moves after the choice."""
        if chosen_TK is None:
            with torch.no_grad():
                biased_TE = (x_TD.float() @ self.weight.float().mT).softmax(dim=-1) + self.bias
                chosen_TK = stable_top_k(biased_TE - biased_TE.min(), self.top_k)
                if self.training:
                    load_E = torch.bincount(chosen_TK.flatten(), minlength=len(self.bias)).float()
                    self.bias += BIAS_STEP * torch.sign(load_E.mean() - load_E)
        return super().forward(x_TD, chosen_TK)


class MicroBatchLearner(Learner):
    """The balance loss takes each micro-batch's own expert frequencies, not the global batch's."""

    def _add_router_losses(
        self, share: torch.Tensor, routing: Routing, counts_ME: torch.Tensor, tokens: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super()._add_router_losses(share, routing, routing.counts_E, tokens)


_PLACES = {
    "latent-norm": ("mai_thinking.model.modeling.LatentMoE", LatentNorm),
    "shared-expert": ("mai_thinking.model.modeling.LatentMoE", SharedExpert),
    "bias-balance": ("mai_thinking.model.latent_moe.Router", BiasRouter),
    "micro-batch-balance": ("mai_thinking.recipes.pretrain.Learner", MicroBatchLearner),
}


@contextmanager
def probing(probe: Probe | None) -> Iterator[None]:
    """Within, new models or learners are those that `probe` names."""
    if probe is None:
        yield
        return
    place, stand_in = _PLACES[probe]
    with patch(place, stand_in):
        yield
