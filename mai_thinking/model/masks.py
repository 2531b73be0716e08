"""What queries may see: a mask for each kind of layer, in the form that the chosen attention function takes."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from mai_thinking.model.configuration import GLOBAL, LOCAL, MaiThinkingConfig
from mai_thinking.model.packed_attention import find_documents
from mai_thinking.model.packed_flex import packed_block_mask


def layer_masks(
    config: MaiThinkingConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict[str, Any] | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
    *,
    half: bool,
) -> dict[str, Any]:
    """By kind of layer. `position_ids` [B, T] that restart inside a row keep documents apart. `half` says that layers
    compute in half precision on a GPU, where flash attention is to be had."""
    if isinstance(attention_mask, dict):  # `generate` with a static cache prepares them ahead
        return attention_mask
    if attention_mask is None and past_key_values is None:
        packed = _packed_masks(config, inputs_embeds, position_ids, half=half)
        if packed is not None:
            return packed
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    make = {GLOBAL: create_causal_mask, LOCAL: create_sliding_window_causal_mask}
    return {kind: make[kind](**arguments) for kind in set(config.layer_types or ())}


def _packed_masks(
    config: MaiThinkingConfig, inputs_embeds: Tensor, position_ids: Tensor | None, *, half: bool
) -> dict[str, Any] | None:
    """For whole rows: what our own attention functions take in a mask's place, if they are to be used."""
    kind, (rows, length) = config._attn_implementation, inputs_embeds.shape[:2]
    if inputs_embeds.is_cuda and (config.head_dim % 8 or not 16 <= config.head_dim <= 256):
        return None  # neither kernel takes such heads
    if kind == "packed_flex" and (inputs_embeds.is_cuda or not torch.is_grad_enabled()):  # no backward on a CPU
        positions_1T = torch.arange(length, device=inputs_embeds.device)[None]
        positions_BT = (positions_1T if position_ids is None else position_ids).expand(rows, -1)
        windows = {LOCAL: config.sliding_window, GLOBAL: None}
        return {layer: packed_block_mask(positions_BT, window) for layer, window in windows.items()}
    if kind == "windowed_sdpa" and half:
        return dict.fromkeys((GLOBAL, LOCAL), find_documents(position_ids, rows, length, inputs_embeds.device))
    return None


def real_tokens(attention_mask: Any, x_BTD: Tensor) -> Tensor | None:
    """Which of the current tokens are no padding, [B, T] bool; None if all are real, or if the mask does not tell."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -x_BTD.size(1) :].bool()
