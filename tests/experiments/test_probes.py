"""Architectures that a ladder may ask about: each changes what it says and nothing else."""

import pytest
import torch

from mai_thinking.experiments.probes import BIAS_STEP, probing
from mai_thinking.model import LatentMoE, MaiThinkingConfig, MaiThinkingForCausalLM, latent_moe, modeling
from mai_thinking.recipes import pretrain
from tiny_models import SIZES


def tiny_config() -> MaiThinkingConfig:
    return MaiThinkingConfig(**SIZES)


def built(probe: str | None) -> MaiThinkingForCausalLM:
    torch.manual_seed(0)
    with probing(probe):  # type: ignore[arg-type]
        return MaiThinkingForCausalLM(tiny_config())


def moe(model: MaiThinkingForCausalLM) -> LatentMoE:
    return next(module for module in model.modules() if isinstance(module, LatentMoE))


@pytest.mark.parametrize("probe", ["latent-norm", "shared-expert", "bias-balance", "micro-batch-balance"])
def test_afterwards_everything_is_as_it_was(probe: str) -> None:
    before = modeling.LatentMoE, latent_moe.Router, pretrain.Learner
    with probing(probe):  # type: ignore[arg-type]
        assert (modeling.LatentMoE, latent_moe.Router, pretrain.Learner) != before
    assert (modeling.LatentMoE, latent_moe.Router, pretrain.Learner) == before


def test_the_norm_takes_the_latents_scale_away() -> None:
    x = torch.randn(1, 5, tiny_config().hidden_size)
    normed, plain = (
        (layer.latent_down(10 * x) - layer.latent_down(x)).abs().max()
        for layer in (moe(built("latent-norm")), moe(built(None)))
    )
    assert normed < 1e-2
    assert plain > 1e-2


def test_a_shared_expert_takes_the_place_of_a_chosen_one() -> None:
    config: MaiThinkingConfig = tiny_config()
    model = built("shared-expert")
    x = torch.randn(1, 5, config.hidden_size)
    out, routing, chosen = moe(model)(x)
    assert chosen.shape[-1] == config.num_experts_per_tok - 1
    assert routing.counts_E.sum() == 5 * (config.num_experts_per_tok - 1)
    with torch.no_grad():
        moe(model).shared_out.weight.zero_()  # type: ignore[union-attr]
    assert not torch.equal(moe(model)(x)[0], out)


def test_a_bias_moves_load_from_the_busy_to_the_idle() -> None:
    layer = moe(built("bias-balance")).train()
    x = torch.randn(1, 64, tiny_config().hidden_size)
    first = layer(x)[1].counts_E
    for _ in range(400):
        counts = layer(x)[1].counts_E
    assert counts.std() < 0.5 * first.std()
    assert layer.router.bias.abs().max() <= 401 * BIAS_STEP + 1e-6
    before = layer.router.bias.clone()
    layer.eval()(x)
    assert torch.equal(layer.router.bias, before)
