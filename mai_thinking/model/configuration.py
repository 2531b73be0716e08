"""The architecture's one configuration, and the ladder that derives it from a single number.

Source: MAI-Thinking-1 report §2.1, §2.6.2, Tables 1 and 7. What the report leaves open is a field with its reason.
"""

import math
from dataclasses import fields
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import create_model
from transformers import PretrainedConfig

from mai_thinking.config.base import Section
from mai_thinking.config.loading import validate
from mai_thinking.errors import UsageError

LOCAL = "sliding_attention"
GLOBAL = "full_attention"


class MaiThinkingConfig(PretrainedConfig):
    """Sizes and switches of a MaiThinkingForCausalLM. The defaults are the ladder's lowest published rung, L12.
    Inconsistent sizes raise a `UsageError` that names the field and the fix."""

    model_type: ClassVar[str] = "mai_thinking"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "aux_loss", "router_logits"]
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.q_norm": "replicated_with_grad_allreduce",
        "layers.*.attention.k_norm": "replicated_with_grad_allreduce",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
        "layers.*.feed_forward.experts.gate_up_proj": "packed_colwise",
        "layers.*.feed_forward.experts.down_proj": "rowwise",
        "layers.*.feed_forward.experts": "moe_tp_experts",
    }
    base_model_ep_plan: ClassVar[dict[str, str]] = {
        "layers.*.feed_forward.experts.gate_up_proj": "grouped_gemm",
        "layers.*.feed_forward.experts.down_proj": "grouped_gemm",
        "layers.*.feed_forward.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 200_019
    hidden_size: int = 1024
    """D, the width of the residual stream."""
    num_hidden_layers: int = 12
    intermediate_size: int = 1024
    """Inner width of the dense SwiGLU layers; the report's tables give gate and up fused, twice this."""

    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    attention_period: int = 6
    """Every so many layers the last is global and has no positions; the others are local, with RoPE and a window."""
    sliding_window: int = 512
    """A local layer's token sees itself and the `sliding_window - 1` tokens before it."""
    rope_theta: float = 10_000.0
    offset_keys: bool = False
    """Half of a key's dimensions, in local layers the slower pairs of RoPE, are those of the token before, so that one
    layer finds what followed an earlier occurrence of a token. The report does not have it. Known from small fast
    recipes ("partial key offset"); after Olsson et al., 2022, "In-context learning and induction heads"."""
    max_position_embeddings: int = 16_384
    """Longest context trained on. Nothing in the architecture depends on it: global layers have no positions."""

    moe_period: int = 2
    """Every so many layers the last has a LatentMoE, the others a dense SwiGLU; 1 puts a LatentMoE in every layer."""
    num_experts: int = 512
    num_experts_per_tok: int = 8
    latent_size: int = 512
    """Width in which experts work, after the shared down-projection from D."""
    moe_intermediate_size: int = 768
    """Inner width of one expert."""
    renormalize_top_k: bool = True
    """Whether a token's eight weights, taken from a softmax over all experts, are scaled to sum to 1. The RMSNorm on
    the sublayer's output removes any common scale, so this changes only how large its epsilon looks: without it the
    norm's input shrinks by about num_experts / num_experts_per_tok at initialisation, to where epsilon rules."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balance loss. Not in the report for pre-training; 0.01 is GShard's and Switch's value."""
    router_z_loss_coef: float = 0.0
    """Weight of the squared log-sum-exp of router logits (ST-MoE). Off: the report does not mention one."""

    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    zero_init_attention: bool = True
    """Attention's output gains start at 0, so that the model begins as a stack of feed-forward layers (§2.6.2)."""
    dropout: float = 0.15
    """On each sublayer's output, before the residual add; in pre-training too."""
    document_masking: bool = True
    """Packed documents do not attend to each other (documents are where `position_ids` restart). Otherwise text of
    unrelated documents would be context for whichever happens to follow it."""

    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    output_router_logits: bool = False
    layer_types: list[str] | None = None
    """Derived: which layers are local and which global, under the names that the library's caches know."""

    def __post_init__(self, **kwargs: Any) -> None:
        _check(self)
        self.layer_types = [
            GLOBAL if (layer + 1) % self.attention_period == 0 else LOCAL for layer in range(self.num_hidden_layers)
        ]
        super().__post_init__(**kwargs | {"auto_map": {name: f"{_STUB}.{model}" for name, model in _CLASSES.items()}})

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """`config.json`, and beside it a few lines that import this package, for command-line tools that do not: they
        load the folder with `trust_remote_code`."""
        super().save_pretrained(save_directory, **kwargs)
        names = ", ".join(_CLASSES.values())
        text = f'"""Imports the package whose model this is."""\n\nfrom mai_thinking.model import {names}\n'
        Path(save_directory, f"{_STUB}.py").write_text(text, encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: folders name this package and hold no copy of its files."""

    @classmethod
    def ladder(cls, rung: int, **changes: Any) -> Self:
        """The ladder's rung L: one number, a multiple of 6, sets every size (§2.2, Table 1)."""
        if rung <= 0 or rung % 6:
            raise UsageError(
                f"ladder: {rung} is not a multiple of 6; the nearest rung is L{max(6, round(rung / 6) * 6)}"
            )
        hidden = rung * 256 // 3
        sizes = {
            "num_hidden_layers": rung,
            "hidden_size": hidden,
            "intermediate_size": hidden,
            "latent_size": hidden // 2,
            "moe_intermediate_size": hidden * 3 // 4,
            # Python's round is half to even, which is what fits Table 1 (REPORT §1 derives it).
            "num_attention_heads": max(16, 8 * round(rung / 8)),
        }
        return cls(**(sizes | changes))

    @classmethod
    def mai_base_1(cls, **changes: Any) -> Self:
        """The full model: L78 with a narrower latent and wider experts (Table 7)."""
        return cls.ladder(78, **({"latent_size": 3072, "moe_intermediate_size": 5120} | changes))

    @classmethod
    def from_section(cls, section: dict[str, Any], **changes: Any) -> Self:
        """The `model:` section of a run's config: `ladder: L` or `preset: mai-base-1`, and fields laid over it. Raises
        `UsageError` with the nearest valid name for an unknown key."""
        given = validate(_section_schema(), section | changes, "model").model_dump(exclude_unset=True)
        rung, preset = given.pop("ladder", None), given.pop("preset", None)
        if rung is not None and preset is not None:
            raise UsageError("model: give `ladder` or `preset`, not both")
        if preset is not None:
            return cls.mai_base_1(**given)
        return cls(**given) if rung is None else cls.ladder(rung, **given)

    def to_section(self) -> dict[str, Any]:
        """The `model:` section that makes this architecture."""
        return {name: getattr(self, name) for name in _section_schema().model_fields if name not in _SHORTHANDS}

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers whose feed-forward is a LatentMoE."""
        return [layer for layer in range(self.num_hidden_layers) if (layer + 1) % self.moe_period == 0]

    @property
    def cached_dims(self) -> tuple[int, int]:
        """Sizes of a head's key and of its value as a cache keeps them."""
        return self.head_dim + (self.head_dim // 2 if self.offset_keys else 0), self.head_dim

    def parameter_breakdown(self) -> dict[str, int]:
        """Parameters by part; `experts` counts all of them, `active_experts` the chosen ones of each layer."""
        D, layers, moe = self.hidden_size, self.num_hidden_layers, len(self.moe_layers)
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        expert = 3 * self.latent_size * self.moe_intermediate_size
        return {
            "embeddings": self.vocab_size * D * (1 if self.tie_word_embeddings else 2),
            "attention": layers * (2 * D * queries + 2 * D * keys),
            "dense": (layers - moe) * 3 * D * self.intermediate_size,
            "router": moe * self.num_experts * D,
            "latent_projections": moe * 2 * D * self.latent_size,
            "experts": moe * self.num_experts * expert,
            "active_experts": moe * self.num_experts_per_tok * expert,
            "norms": layers * (4 * D + 2 * self.head_dim) + D,
        }

    def parameter_counts(self) -> tuple[int, int]:
        """(total, active): all parameters, and those that one token uses. The tied vocabulary matrix counts once."""
        parts = self.parameter_breakdown()
        active_experts = parts.pop("active_experts")
        total = sum(parts.values())
        return total, total - parts["experts"] + active_experts

    def flops_per_token(self, context: int) -> float:
        """FLOPs of a training step per token of a full `context`, by the rule of `training_flops`."""
        attended = 0.0
        for kind in self.layer_types or []:
            window = min(self.sliding_window, context) if kind == LOCAL else context
            # Mean number of keys that a causal query sees: a triangle, then a band of constant width.
            attended += window - window * (window - 1) / (2 * context)
        return self.training_flops(1, attended)

    def training_flops(self, tokens: float, attended: float) -> float:
        """FLOPs of a training step (forward and backward) on `tokens` tokens that see `attended` keys, all together and
        in all layers: matrix products and attention only, no recomputation, a multiply-add as two (the report's rule
        for MFU, §2.8)."""
        _, active = self.parameter_counts()
        in_products = active - self.parameter_breakdown()["norms"]
        scores_and_values = 2 * self.num_attention_heads * self.head_dim * attended
        return 6.0 * (in_products * tokens + scores_and_values)


_STUB = "modeling_mai_thinking"
_CLASSES = {
    "AutoConfig": "MaiThinkingConfig",
    "AutoModel": "MaiThinkingModel",
    "AutoModelForCausalLM": "MaiThinkingForCausalLM",
    "AutoModelForSequenceClassification": "MaiThinkingForSequenceClassification",
    "AutoModelForTokenClassification": "MaiThinkingForTokenClassification",
}
"""What the library's Auto classes make of a model folder."""

_LEAST, _LARGEST = {"rope_theta": 1.0, "rms_norm_eps": 1e-30}, 1e12
"""Bounds of numbers that are no sizes, the least of others being 0: what is beyond them is a slip, or is infinite in
fp32 when multiplied."""

_SHORTHANDS: dict[str, Any] = {"ladder": (int | None, None), "preset": (Literal["mai-base-1"] | None, None)}
"""Keys of a `model:` section that stand for many fields."""


@cache
def _section_schema() -> type[Section]:
    """The fields above as a pydantic model, so that the YAML section has their names and types and no second list."""
    inherited = {field.name for field in fields(PretrainedConfig)} | {"layer_types"}
    own: dict[str, Any] = {
        field.name: (field.type, field.default) for field in fields(MaiThinkingConfig) if field.name not in inherited
    }
    return create_model("ModelSection", __base__=Section, **_SHORTHANDS, **own)


def _check(config: MaiThinkingConfig) -> None:
    """Sizes that do not fit together, each with the fix."""
    if not 0.0 <= config.dropout < 1.0:
        raise UsageError(f"model.dropout: {config.dropout} is not in [0, 1)")
    for name, field in _section_schema().model_fields.items():
        value, least = getattr(config, name, None), _LEAST.get(name, 0.0)  # a shorthand is no attribute
        if field.annotation is int and not (isinstance(value, int) and 1 <= value < 2**31):
            raise UsageError(f"model.{name}: must be a whole number of at least 1 and less than 2^31, got {value!r}")
        if field.annotation is float and not (isinstance(value, int | float) and least <= value <= _LARGEST):  # nor NaN
            raise UsageError(f"model.{name}: must be a number from {least:g} to {_LARGEST:g}, got {value!r}")
    layers, period = config.num_hidden_layers, config.attention_period
    if layers % period:
        raise UsageError(
            f"model.num_hidden_layers: {layers} is not a multiple of attention_period {period}; "
            f"use {math.ceil(layers / period) * period} layers or another period"
        )
    if layers % config.moe_period:
        raise UsageError(f"model.num_hidden_layers: {layers} is not a multiple of moe_period {config.moe_period}")
    if config.num_experts_per_tok < 2:
        raise UsageError(
            "model.num_experts_per_tok: with 1 the task's loss gives routers no gradient, since the norm behind the "
            "experts takes any one weight's size away; use 2 or more"
        )
    if config.num_experts_per_tok > config.num_experts:
        raise UsageError(
            f"model.num_experts_per_tok: {config.num_experts_per_tok} of only {config.num_experts} experts; "
            "lower it or raise num_experts"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UsageError(
            f"model.num_attention_heads: {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}, which groups of query heads share"
        )
    if config.offset_keys and config.head_dim % 4:
        raise UsageError(f"model.head_dim: {config.head_dim} is not a multiple of 4, which offset_keys needs")
    if config.head_dim % 2:
        raise UsageError(f"model.head_dim: {config.head_dim} is odd; RoPE turns pairs, so use an even size")
