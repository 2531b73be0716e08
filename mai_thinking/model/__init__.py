"""The LatentMoE transformer as a Hugging Face model, known to the Auto classes once this package is imported."""

from transformers import AutoConfig, AutoModelForCausalLM

from mai_thinking.model.configuration import MaiThinkingConfig
from mai_thinking.model.latent_moe import LatentMoE
from mai_thinking.model.modeling import MaiThinkingForCausalLM

AutoConfig.register("mai_thinking", MaiThinkingConfig, exist_ok=True)
AutoModelForCausalLM.register(MaiThinkingConfig, MaiThinkingForCausalLM, exist_ok=True)

__all__ = ["LatentMoE", "MaiThinkingConfig", "MaiThinkingForCausalLM"]
