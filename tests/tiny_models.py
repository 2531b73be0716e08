"""Small models for tests."""

from typing import Any

import torch

from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM

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
