"""The LatentMoE transformer as a Hugging Face model, known to the Auto classes once this package is imported."""

import transformers

from mai_thinking.model.configuration import MaiThinkingConfig
from mai_thinking.model.latent_moe import LatentMoE
from mai_thinking.model.modeling import (
    MaiThinkingForCausalLM,
    MaiThinkingForSequenceClassification,
    MaiThinkingForTokenClassification,
    MaiThinkingModel,
)

transformers.AutoConfig.register("mai_thinking", MaiThinkingConfig, exist_ok=True)
transformers.AutoModel.register(MaiThinkingConfig, MaiThinkingModel, exist_ok=True)
for model in (MaiThinkingForCausalLM, MaiThinkingForSequenceClassification, MaiThinkingForTokenClassification):
    auto = getattr(transformers, model.__name__.replace("MaiThinking", "AutoModel"))
    auto.register(MaiThinkingConfig, model, exist_ok=True)

__all__ = [
    "LatentMoE",
    "MaiThinkingConfig",
    "MaiThinkingForCausalLM",
    "MaiThinkingForSequenceClassification",
    "MaiThinkingForTokenClassification",
    "MaiThinkingModel",
]
