"""Small models for tests, and what trains them."""

from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from mai_thinking.config.run import TrainingConfig
from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from mai_thinking.training.learner import Learner

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "latent_size": 16,
    "moe_intermediate_size": 20,
    "dropout": 0.0,
    "pad_token_id": 1,
    "eos_token_id": 0,
}


def tiny_model(
    seed: int = 0, *, experts: str = "bucketed_mm", attention: str = "sdpa", **changes: Any
) -> MaiThinkingForCausalLM:
    """A model whose attention is switched on, as after some training, so that tests see it."""
    torch.manual_seed(seed)
    config = MaiThinkingConfig(**(SIZES | {"initializer_range": 0.2, "zero_init_attention": False} | changes))
    model = MaiThinkingForCausalLM._from_config(config, experts_implementation=experts, attn_implementation=attention)
    return model.eval()


def tiny_learner(
    model: MaiThinkingForCausalLM,
    *,
    balance: float = 0.0,
    z: float = 0.0,
    clip_norm: float = 1e6,
    learning_rate: float = 1e-9,
    optimizer: str = "adamw",
    **execution: Any,
) -> tuple[Learner, dict[str, torch.Tensor]]:
    """A learner of `model` on the CPU, and a dict that each update fills with what it hands to the optimiser."""
    config = TrainingConfig.model_validate(
        {
            "name": "x", "steps": 100, "execution": execution, "schedule": {"shape": "constant"},
            "optimizer": {"name": optimizer, "clip_norm": clip_norm, "learning_rate": learning_rate},
        }
    )  # fmt: skip
    learner = Learner(model.train(), config, Accelerator(cpu=True), balance=balance, z=z)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in learner.unwrap().named_parameters():
            if (gradient := parameter.grad) is not None:
                gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()

    learner.optimizer.register_step_pre_hook(keep)
    return learner, gradients
