"""The decoder: blocks of attention and feed-forward between sandwich norms, with tied embeddings.

Source: MAI-Thinking-1 report §2.1, §2.6.2–2.6.3. Held in fp32 whatever the weights' dtype: the residual stream, norms,
router, embeddings and logits.

Shapes: B batch, T tokens, D hidden size, V vocabulary, M MoE layers, E experts, K chosen per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from mai_thinking.model.attention import Attention, RotaryTables, rotary_tables
from mai_thinking.model.configuration import GLOBAL, LOCAL, MaiThinkingConfig
from mai_thinking.model.latent_moe import Experts, LatentMoE, Router, Routing, balance_loss
from mai_thinking.model.loss import chunked_cross_entropy
from mai_thinking.model.norm import RMSNorm
from mai_thinking.model.packed_attention import Documents, find_documents
from mai_thinking.model.packed_flex import packed_block_mask
from mai_thinking.model.precision import half_precision
from mai_thinking.model.projection import residual_projection


class DenseFeedForward(nn.Module):
    """SwiGLU, [B, T, D] → [B, T, D], without its norms."""

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = residual_projection(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class DecoderLayer(GradientCheckpointingLayer):
    """x + dropout(norm(attention(norm(x)))), then the same with the feed-forward: dense or LatentMoE."""

    def __init__(self, config: MaiThinkingConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.kind: str = config.layer_types[layer_idx]
        self.is_moe = layer_idx in config.moe_layers
        self.dropout = config.dropout
        D, epsilon = config.hidden_size, config.rms_norm_eps
        self.attention_in_norm = RMSNorm(D, epsilon)
        self.attention = Attention(config, layer_idx)
        self.attention_out_norm = RMSNorm(D, epsilon, 0.0 if config.zero_init_attention else 1.0)
        self.feed_forward_in_norm = RMSNorm(D, epsilon)
        self.feed_forward = LatentMoE(config) if self.is_moe else DenseFeedForward(config)
        self.feed_forward_out_norm = RMSNorm(D, epsilon)

    def forward(
        self,
        residual_BTD: torch.Tensor,
        attention_mask: torch.Tensor | Documents | None = None,
        rotary: RotaryTables | None = None,
        token_mask_BT: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        chosen_BTK: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Routing | None, torch.Tensor | None, torch.Tensor | None]:
        """→ residual stream [B, T, D] fp32 and, of a MoE layer, its routing, router logits [B·T, E] and the experts
        that it used [B, T, K], which are `chosen_BTK` where that is given."""
        weight_dtype = self.attention.o_proj.weight.dtype
        x_BTD = self.attention_in_norm(residual_BTD).to(weight_dtype)
        x_BTD = self.attention(x_BTD, rotary, attention_mask, past_key_values, **kwargs)
        residual_BTD = residual_BTD + self._drop(self.attention_out_norm(x_BTD))

        x_BTD = self.feed_forward_in_norm(residual_BTD)
        routing = router_logits = None
        if self.is_moe:
            # The router reads the norm's fp32 output; the block casts for its own projections.
            x_BTD, routing, router_logits, chosen_BTK = self.feed_forward(x_BTD, token_mask_BT, chosen_BTK)
        else:
            x_BTD = self.feed_forward(x_BTD.to(weight_dtype))
        residual_BTD = residual_BTD + self._drop(self.feed_forward_out_norm(x_BTD))
        return residual_BTD, routing, router_logits, chosen_BTK

    def _drop(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return F.dropout(x_BTD, self.dropout, self.training)


class MaiThinkingPreTrainedModel(PreTrainedModel):
    """What the library needs to know to load, initialise and dispatch the model."""

    config: MaiThinkingConfig
    config_class = MaiThinkingConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar = ["embed_tokens", "lm_head", "norm", "router"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the library would look for its decorator in this file; ours is in latent_moe.py

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # likewise, in attention.py

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Ours, unless another is asked for: it is the fastest on CPU and hands over to grouped_mm elsewhere."""
        return super().get_correct_experts_implementation(requested_experts or "bucketed_mm")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02); what feeds the residual stream 1/√(its 2·layers sublayers) smaller; gains 1, attention's 0."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            if getattr(module, "feeds_residual", False):
                std /= (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, RMSNorm):
            init.constant_(module.weight, module.initial_gain)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


@dataclass
class MaiThinkingModelOutput(ModelOutput):
    """The decoder's output; `routing` has a leading dimension of MoE layers."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    routing: Routing | None = None
    expert_choices: torch.Tensor | None = None
    """[M, B, T, K] int64."""


@dataclass
class MaiThinkingOutput(ModelOutput):
    """What the language model returns. `loss` is the cross-entropy, plus the weighted `aux_loss` where
    `output_router_logits` asks for that; a trainer that balances over a global batch takes `routing` instead."""

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    routing: Routing | None = None
    expert_choices: torch.Tensor | None = None
    scores: torch.Tensor | None = None


Head = Callable[[torch.Tensor, torch.Tensor, torch.dtype | None], torch.Tensor]
"""What may take the place of the logits: hidden states [B, T, D] fp32, the head's weights [V, D] and what the product's
operands are to be rounded to (`half_precision`) → scores."""


class MaiThinkingModel(MaiThinkingPreTrainedModel):
    """Embeddings, decoder layers, final norm."""

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool = False,
        token_mask: torch.Tensor | None = None,
        expert_choices: torch.Tensor | None = None,
        output_expert_choices: bool = False,
        **kwargs: Any,
    ) -> MaiThinkingModelOutput:
        """`input_ids` [B, T] int64 → hidden states [B, T, D] fp32.

        `attention_mask` [B, T] marks padding with 0. Without one, `position_ids` [B, T] that restart inside a row mark
        packed documents, which `config.document_masking` keeps apart; `token_mask` [B, T] bool then tells which tokens
        count in the routing's sums. `expert_choices` [M, B, T, K] int64 replace the routers' own choice (§3.1).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        residual_BTD = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds).float()
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        packed = position_ids is not None and self.config.document_masking
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (seen + torch.arange(residual_BTD.size(1), device=residual_BTD.device))[None]
        masks = self._masks(residual_BTD, attention_mask, past_key_values, position_ids if packed else None)
        token_mask_BT = _token_mask(attention_mask, residual_BTD) if token_mask is None else token_mask
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)

        hidden_states, routings, router_logits = [], [], []
        choices: list[torch.Tensor] = []
        for layer in self.layers:
            hidden_states.append(residual_BTD)
            replayed_BTK = expert_choices[len(choices)] if expert_choices is not None and layer.is_moe else None
            residual_BTD, routing, logits, chosen_BTK = layer(
                residual_BTD,
                attention_mask=masks[str(layer.kind)],
                rotary=rotary,
                token_mask_BT=token_mask_BT,
                past_key_values=past_key_values,
                chosen_BTK=replayed_BTK,
                position_ids=position_ids,
                **kwargs,
            )
            if routing is not None:
                routings.append(routing)
                router_logits.append(logits)
                choices.append(chosen_BTK)
        residual_BTD = self.norm(residual_BTD)
        hidden_states.append(residual_BTD)
        return MaiThinkingModelOutput(
            last_hidden_state=residual_BTD,
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            router_logits=tuple(router_logits) if output_router_logits else None,
            routing=Routing(*(torch.stack(parts) for parts in zip(*routings, strict=True))) if routings else None,
            expert_choices=torch.stack(choices) if output_expert_choices and choices else None,
        )

    def _packed_masks(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor | None) -> dict[str, Any] | None:
        """For whole rows: what our own attention functions take in a mask's place, if they are to be used."""
        kind, (rows, length) = self.config._attn_implementation, inputs_embeds.shape[:2]
        if inputs_embeds.is_cuda and (self.config.head_dim % 8 or not 16 <= self.config.head_dim <= 256):
            return None  # neither kernel takes such heads
        if kind == "packed_flex" and (inputs_embeds.is_cuda or not torch.is_grad_enabled()):  # no backward on a CPU
            positions_1T = torch.arange(length, device=inputs_embeds.device)[None]
            positions_BT = (positions_1T if position_ids is None else position_ids).expand(rows, -1)
            windows = {LOCAL: self.config.sliding_window, GLOBAL: None}
            return {layer: packed_block_mask(positions_BT, window) for layer, window in windows.items()}
        if kind == "windowed_sdpa" and self.half_precision is not None:
            return dict.fromkeys((GLOBAL, LOCAL), find_documents(position_ids, rows, length, inputs_embeds.device))
        return None

    @property
    def half_precision(self) -> torch.dtype | None:
        """What the layers compute in, if that is half precision on a GPU: flash attention is to be had, and logits are
        products of such operands."""
        weight: torch.Tensor = self.layers[0].attention.o_proj.weight  # type: ignore[assignment, union-attr]
        return half_precision(weight)

    def _masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, Any] | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
    ) -> dict[str, Any]:
        """One mask a kind of layer, in the form that the chosen attention function takes."""
        if isinstance(attention_mask, dict):  # `generate` with a static cache prepares them ahead
            return attention_mask
        if attention_mask is None and past_key_values is None:
            packed = self._packed_masks(inputs_embeds, position_ids)
            if packed is not None:
                return packed
        arguments = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        make = {GLOBAL: create_causal_mask, LOCAL: create_sliding_window_causal_mask}
        return {kind: make[kind](**arguments) for kind in set(self.config.layer_types or ())}


class MaiThinkingForCausalLM(MaiThinkingPreTrainedModel, GenerationMixin):
    """The language model. The head is the embedding matrix (tied), applied in fp32."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__(config)
        self.model = MaiThinkingModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool = False,
        head: Head | None = None,
        **kwargs: Any,
    ) -> MaiThinkingOutput:
        """Tokens [B, T] → logits [B, T, V] fp32 and, given labels, the loss.

        `labels` are the tokens themselves, shifted here; `shift_labels` are each position's next token already; -100
        is ignored. The cross-entropy is summed and divided by `num_items_in_batch`, or by the number of labels.
        `skip_logits` computes the loss without ever holding all logits at once. `head` takes the place of the logits:
        it is called here, inside the forward pass, where sharded weights are whole, and its result is in `scores`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden_BTD = output.last_hidden_state
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = aux_loss = logits = scores = None
        dtype = self.model.half_precision
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            if head is not None:
                scores = head(hidden_BTD, self.lm_head.weight, dtype)
            elif not skip_logits:
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                logits = self.lm_head(hidden_BTD[:, kept].to(self.lm_head.weight.dtype)).float()
            if shift_labels is not None:
                items = (shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
                loss = chunked_cross_entropy(hidden_BTD, self.lm_head.weight, shift_labels, dtype) / items
        if output_router_logits and output.routing is not None:
            routing = output.routing
            aux_loss = balance_loss(routing.counts_E, routing.probabilities_E, routing.tokens[0])
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return MaiThinkingOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            router_logits=output.router_logits,
            routing=output.routing,
            expert_choices=output.expert_choices,
            scores=scores,
        )


def _token_mask(attention_mask: Any, x_BTD: torch.Tensor) -> torch.Tensor | None:
    """Which of the current tokens are real, [B, T] bool; None if all are, or if the mask does not tell."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -x_BTD.size(1) :].bool()
