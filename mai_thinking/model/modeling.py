"""The decoder: blocks of attention and feed-forward between sandwich norms, with tied embeddings.

Source: MAI-Thinking-1 report §2.1, §2.6.2–2.6.3. Held in fp32 whatever the weights' dtype: the residual stream, norms,
router, embeddings and logits.

Shapes: B batch, T tokens, D hidden size, V vocabulary, M MoE layers, E experts, K chosen per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from mai_thinking.model.attention import Attention, RotaryTables, layer_masks, real_tokens, rotary_tables
from mai_thinking.model.configuration import MaiThinkingConfig
from mai_thinking.model.latent_moe import Experts, LatentMoE, Router, Routing, balance_loss
from mai_thinking.model.loss import chunked_cross_entropy
from mai_thinking.model.norm import RMSNorm
from mai_thinking.model.packed_attention import Documents
from mai_thinking.model.projection import HALF, WIDE, residual_projection, weight_dtype


class DenseFeedForward(nn.Module):
    """SwiGLU, [B, T, D] → [B, T, D], without its norms."""

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = residual_projection(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD.to(weight_dtype(self.gate_proj, self.config))
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class DecoderLayer(GradientCheckpointingLayer):
    """x + dropout(norm(attention(norm(x)))), then the same with the feed-forward: dense or LatentMoE."""

    def __init__(self, config: MaiThinkingConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.kind: str = config.layer_types[layer_idx]
        self.is_moe = layer_idx in config.moe_layers
        self.dropout = nn.Dropout(config.dropout)  # a module, since trainers look for these to turn dropout off
        D, epsilon = config.hidden_size, config.rms_norm_eps
        self.attention_in_norm = RMSNorm(D, epsilon)
        self.attention = Attention(config, layer_idx)
        self.attention_out_norm = RMSNorm(D, epsilon, 0.0 if config.zero_init_attention else 1.0)
        self.feed_forward_in_norm = RMSNorm(D, epsilon)
        self.feed_forward = LatentMoE(config) if self.is_moe else DenseFeedForward(config)
        self.feed_forward_out_norm = RMSNorm(D, epsilon)

    def forward(
        self,
        residual_BTD: Tensor,
        attention_mask: Tensor | Documents | None = None,
        rotary: RotaryTables | None = None,
        token_mask_BT: Tensor | None = None,
        past_key_values: Cache | None = None,
        chosen_BTK: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Routing | None, Tensor | None]:
        """→ residual stream [B, T, D] fp32 and, of a MoE layer, its routing and the experts that it used [B, T, K],
        which are `chosen_BTK` where that is given."""
        # The norms' outputs are fp32, as the router reads them; what has other weights casts for itself.
        x_BTD = self.attention_in_norm(residual_BTD)
        x_BTD, _ = self.attention(x_BTD, rotary, attention_mask, past_key_values, **kwargs)
        residual_BTD = residual_BTD + self.dropout(self.attention_out_norm(x_BTD))

        x_BTD = self.feed_forward_in_norm(residual_BTD)
        routing = None
        if self.is_moe:
            x_BTD, routing, chosen_BTK = self.feed_forward(x_BTD, token_mask_BT, chosen_BTK)
        else:
            x_BTD = self.feed_forward(x_BTD)
        return residual_BTD + self.dropout(self.feed_forward_out_norm(x_BTD)), routing, chosen_BTK


class MaiThinkingPreTrainedModel(PreTrainedModel):
    """What the library needs to know to load, initialise and dispatch the model."""

    config: MaiThinkingConfig
    config_class = MaiThinkingConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar = {
        "hidden_states": DecoderLayer,
        "attentions": Attention,
        "router_logits": OutputRecorder(Router, index=2),
    }

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that follow the dtype asked for; embeddings are fp32 in any case. The library writes it into
        `config.json`, and loads the folder in it."""
        return next(module.down_proj.dtype for module in self.modules() if isinstance(module, Experts))

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
class MaiThinkingModelOutput(MoeModelOutputWithPast):
    """The decoder's output."""

    routing: Routing | None = None
    """With a leading dimension of MoE layers, if `output_routing` asked for it."""
    expert_choices: Tensor | None = None
    """[M, B, T, K] int64, if `output_expert_choices` asked for them."""


@dataclass
class MaiThinkingOutput(MoeCausalLMOutputWithPast):
    """What the language model returns. `loss` is the cross-entropy, plus the weighted `aux_loss` where
    `output_router_logits` asks for that; a trainer that balances over a global batch takes `routing` instead."""

    routing: Routing | None = None
    expert_choices: Tensor | None = None
    scores: Tensor | None = None
    """What `head` returned."""


Head = Callable[[Tensor, Tensor, torch.dtype | None], Tensor]
"""What may take the place of the logits: hidden states [B, T, D] fp32, the head's weights [V, D] and what the product's
operands are to be rounded to (`half_precision`) → scores."""


class MaiThinkingModel(MaiThinkingPreTrainedModel):
    """Embeddings, decoder layers, final norm."""

    _keep_in_fp32_modules_strict: ClassVar = [
        "embed_tokens", "attention_in_norm", "q_norm", "k_norm", "attention_out_norm", "feed_forward_in_norm", "router",
        "feed_forward_out_norm", "norm",
    ]  # fmt: skip

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        expert_choices: Tensor | None = None,
        output_routing: bool = False,
        output_expert_choices: bool = False,
        **kwargs: Any,
    ) -> MaiThinkingModelOutput:
        """`input_ids` [B, T] int64 → hidden states [B, T, D] fp32. `attention_mask` [B, T] marks padding with 0.
        Without one, `position_ids` [B, T] that restart inside a row mark packed documents, which
        `config.document_masking` keeps apart; `token_mask` [B, T] bool then tells which tokens count in the routing's
        sums. `expert_choices` [M, B, T, K] int64 replace the routers' own choice (§3.1)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        residual_BTD = (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds).float()
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        documents = position_ids if self.config.document_masking else None
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (seen + torch.arange(residual_BTD.size(1), device=residual_BTD.device))[None]
        half = self.half_precision is not None
        masks = layer_masks(self.config, residual_BTD, attention_mask, past_key_values, documents, half=half)
        token_mask_BT = real_tokens(attention_mask, residual_BTD) if token_mask is None else token_mask
        rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)

        routings: list[Routing] = []
        choices: list[Tensor] = []
        for layer in islice(self.layers, self.config.num_hidden_layers):
            replayed_BTK = expert_choices[len(choices)] if expert_choices is not None and layer.is_moe else None
            residual_BTD, routing, chosen_BTK = layer(
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
                choices.append(chosen_BTK)
        stacked = (torch.stack(parts) for parts in zip(*routings, strict=True))
        return MaiThinkingModelOutput(
            last_hidden_state=self.norm(residual_BTD),
            past_key_values=past_key_values,
            routing=Routing(*stacked) if output_routing and routings else None,
            expert_choices=torch.stack(choices) if output_expert_choices and choices else None,
        )

    @property
    def half_precision(self) -> torch.dtype | None:
        """What the layers compute in, if that is half precision on a GPU: flash attention is to be had, and logits are
        products of such operands."""
        if not self.norm.weight.is_cuda:
            return None
        dtype = weight_dtype(self.layers[0].attention.q_proj, self.config)  # type: ignore[arg-type, union-attr]
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype
        return dtype if dtype in HALF else None


class MaiThinkingForCausalLM(MaiThinkingPreTrainedModel, GenerationMixin):
    """The language model. The head is the embedding matrix (tied), applied in fp32."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict: ClassVar = ["lm_head"]
    _tp_plan: ClassVar = {"lm_head": "colwise_gather_output"}
    _fsdp_plan: ClassVar = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__(config)
        self.model = MaiThinkingModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
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
        # No argument of its own: the library's trainer takes all of those whose name has "label" in it for required.
        shift_labels = kwargs.pop("shift_labels", None)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_routing=output_routing or output_router_logits,
            **kwargs,
        )
        hidden_BTD = output.last_hidden_state
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        loss = aux_loss = logits = scores = None
        half = self.model.half_precision  # asked while autocast is what the caller made it
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            if head is not None:
                scores = head(hidden_BTD, self.lm_head.weight, half)
            elif not skip_logits:
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                logits = self._logits(hidden_BTD[:, kept])
            if shift_labels is not None:
                items = (shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
                items = items.to(hidden_BTD.device) if isinstance(items, Tensor) else items
                loss = self._cross_entropy(hidden_BTD, shift_labels, half) / items
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
            attentions=output.attentions,
            router_logits=output.router_logits,
            routing=output.routing if output_routing else None,
            expert_choices=output.expert_choices,
            scores=scores,
        )

    def _logits(self, hidden_BTD: Tensor) -> Tensor:
        return self.lm_head(hidden_BTD.to(weight_dtype(self.lm_head, self.config))).float()

    def _cross_entropy(self, hidden_BTD: Tensor, labels_BT: Tensor, half: torch.dtype | None) -> Tensor:
        """Summed over the labels. From the head's weights in chunks, if they are all that the head is; an adapted,
        quantised, offloaded or sharded one is called."""
        head: nn.Module = self.lm_head
        weight = head.weight if isinstance(head, nn.Linear) and not hasattr(head, "_hf_hook") else None
        if type(weight) is nn.Parameter and weight.dtype in WIDE:
            return chunked_cross_entropy(hidden_BTD, weight, labels_BT, half)
        return F.cross_entropy(self._logits(hidden_BTD).flatten(0, 1), labels_BT.flatten(), reduction="sum")


class _Classifier(MaiThinkingPreTrainedModel):
    _keep_in_fp32_modules_strict: ClassVar = ["score"]

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__(config)
        self.score.register_forward_pre_hook(lambda score, inputs: inputs[0].to(weight_dtype(score, config)))


class MaiThinkingForSequenceClassification(_Classifier, GenericForSequenceClassification, MaiThinkingPreTrainedModel):
    """A label for a text: what reward models are to other trainers."""


class MaiThinkingForTokenClassification(_Classifier, GenericForTokenClassification, MaiThinkingPreTrainedModel):
    """A label for each token."""
