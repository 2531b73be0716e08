"""Grouped-query attention: local layers with RoPE and a window, global layers without positions.

Source: MAI-Thinking-1 report §2.1. Kernels, masks and caches are the transformers library's, chosen by
`config._attn_implementation` ("sdpa", "eager", "flash_attention_2", "flex_attention", ...).

"windowed_sdpa" is ours: SDPA that does not compute, only to mask it, what lies outside a local layer's window; in half
precision on a GPU, the flash kernel with documents' offsets in the mask's place (`model.packed_attention`).

Shapes: B batch, T queries, H query heads, G key-value heads, d head size, h half of it, W window, n blocks of W.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    create_causal_mask,
    create_sliding_window_causal_mask,
    padding_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mai_thinking.errors import UsageError
from mai_thinking.model.configuration import GLOBAL, LOCAL, MaiThinkingConfig
from mai_thinking.model.norm import RMSNorm
from mai_thinking.model.packed_attention import Documents, find_documents, packed_attention, packed_block_mask
from mai_thinking.model.projection import residual_projection, weight_dtype

RotaryTables = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """One attention sublayer, [B, T, D] → [B, T, D], without its norms. Queries and keys pass an RMSNorm per head.
    Layers of kind "sliding_attention" rotate them by position; the global ones see no positions at all, so that they
    extend to any length."""

    def __init__(self, config: MaiThinkingConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.config = config
        self.layer_idx = layer_idx
        self.is_local = config.layer_types[layer_idx] == LOCAL
        self.is_causal = True  # read by the library's attention functions, as are the next four
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.sliding_window = config.sliding_window if self.is_local else None

        D, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, queries, bias=False)
        self.k_proj = nn.Linear(D, keys, bias=False)
        self.v_proj = nn.Linear(D, keys, bias=False)
        self.o_proj = residual_projection(queries, D)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: RotaryTables,
        attention_mask: Tensor | Documents | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """→ output, and weights [B, H, T, keys] if the attention function has them at hand ("eager")."""
        x_BTD = x_BTD.to(weight_dtype(self.q_proj, self.config))
        heads = (*x_BTD.shape[:-1], -1, self.head_dim)
        q_BHTd = self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2)
        k_BGTd = self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2)
        v_BGTd = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        if self.config.offset_keys:
            if "cache" in kwargs:
                raise UsageError(
                    "offset_keys: the transformers library's continuous batching keeps no key for the token behind "
                    "it; use `generate`"
                )
            own_BGTh = second_halves(k_BGTd).to(v_BGTd.dtype)
            k_BGTd = offset_keys(k_BGTd, own_BGTh, self._newest(past_key_values), kwargs["position_ids"])
        if self.is_local:
            q_BHTd, k_BGTd = rotate(q_BHTd, rotary), rotate(k_BGTd, rotary)
        # The norms and the rotation are fp32; the kernel takes one dtype and keeps its scores in fp32 by itself.
        q_BHTd, k_BGTd = q_BHTd.to(v_BGTd.dtype), k_BGTd.to(v_BGTd.dtype)
        if past_key_values is not None:
            if self.config.offset_keys:  # what the next token's key takes is cached behind its own
                k_BGTd = torch.cat((k_BGTd, own_BGTh), dim=-1)
            k_BGTd, v_BGTd = past_key_values.update(k_BGTd, v_BGTd, self.layer_idx)
            k_BGTd = k_BGTd[..., : self.head_dim]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        heads_BTHd, weights = attend(
            self,
            q_BHTd,
            k_BGTd,
            v_BGTd,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(heads_BTHd.flatten(2)), weights

    def _newest(self, cache: Cache | None) -> Tensor | None:
        """What a cache keeps of its newest tokens' keys for the next ones, [B, G, 1, d/2]; None of an empty one."""
        if cache is None:
            return None
        if isinstance(cache, Cache):
            layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
            if layer is None or layer.keys is None:
                return None
            if not layer.keys.numel():  # after a crop to nothing, or in a cache that quantises
                if layer.get_seq_length():
                    raise UsageError("offset_keys: a quantised cache does not keep keys as they were; use another")
                return None
            room, seen = layer.keys.size(2), torch.as_tensor(layer.get_seq_length(), device=layer.keys.device)
            keys_BG1k = layer.keys.index_select(2, seen.clamp(1, room).view(1) - 1)
        else:
            keys_BG1k = cache.newest_keys(self.layer_idx)
        return keys_BG1k[..., self.head_dim :]


def second_halves(k_BGTd: Tensor) -> Tensor:
    """[B, G, T, d/2]: of both halves that RoPE turns against each other, the second half: its slower pairs."""
    return k_BGTd.unflatten(-1, (2, 2, -1))[..., 1, :].flatten(-2)


def offset_keys(k_BGTd: Tensor, own_BGTh: Tensor, before_BG1h: Tensor | None, positions_BT: Tensor) -> Tensor:
    """Keys whose `second_halves` are those of the token before: of `own_BGTh` moved on by one, behind `before_BG1h`.
    A document's first token, at position 0, has zeros."""
    shifted_BGTh = F.pad(own_BGTh, (0, 0, 1, 0))[:, :, :-1]
    if before_BG1h is not None:
        shifted_BGTh = torch.cat((before_BG1h, shifted_BGTh[:, :, 1:]), dim=2)
    shifted_BGTh = shifted_BGTh.masked_fill((positions_BT == 0)[:, None, :, None], 0.0)
    parts_BGT2p = k_BGTd.unflatten(-1, (2, 2, -1))[..., 0, :], shifted_BGTh.to(k_BGTd.dtype).unflatten(-1, (2, -1))
    return torch.stack(parts_BGT2p, dim=-2).flatten(-3)


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float) -> RotaryTables:
    """cos and sin, each [B, 1, T, d] in fp32, of the angles position · theta^(−2i/d), for integer positions [B, T]."""
    pairs = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angles_BTp = position_ids[..., None].float() * theta ** (-pairs / head_dim)
    angles_B1Td = torch.cat((angles_BTp, angles_BTp), dim=-1)[:, None]
    return angles_B1Td.cos(), angles_B1Td.sin()


def rotate(x_BHTd: Tensor, rotary: RotaryTables) -> Tensor:
    """RoPE: dimension i and i + d/2 of each head turn together by their position's angle."""
    cos, sin = rotary
    first, second = x_BHTd.chunk(2, dim=-1)
    return x_BHTd * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain products, for `attn_implementation="eager"`: outputs [B, T, H, d] and weights."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = (query.float() @ key.float().transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights


def windowed_sdpa(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | Documents | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA where a local layer's queries, in blocks as long as the window, meet only their own block of keys and the
    one before it: 2·W keys a query instead of T. Whatever has no mask of such blocks goes through the library's SDPA.
    """
    W = module.sliding_window
    if isinstance(mask, Documents):
        return packed_attention(query, key, value, mask, W, kwargs["scaling"]), None
    B, _, T, _ = query.shape
    if mask is None or W is None or T <= 2 * W or mask.shape[-2:] != (W, 2 * W):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    q_BnHWd = query.unflatten(2, (-1, W)).transpose(1, 2).flatten(0, 1)
    k_BnG2Wd, v_BnG2Wd = _two_blocks(key, W), _two_blocks(value, W)
    out_BnWHd, _ = sdpa_attention_forward(module, q_BnHWd, k_BnG2Wd, v_BnG2Wd, mask, **kwargs)
    return out_BnWHd.reshape(B, T, *out_BnWHd.shape[2:]), None


def _two_blocks(states_BGTd: Tensor, W: int) -> Tensor:
    """Keys or values [B, G, T, d] → [B·n, G, 2W, d]: each block behind the one before it (zeros for the first)."""
    blocks = states_BGTd.unflatten(2, (-1, W)).transpose(1, 2)
    before = F.pad(blocks[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat((before, blocks), dim=3).flatten(0, 1)


def windowed_mask(local_size: int | None = None, **given: Any) -> Tensor | None:
    """The library's mask; for a local layer in whole blocks, only the part of it that `windowed_sdpa` looks at, bool
    [B·n, 1, W, 2W]: all of it, T × T, would cost more than the layer as the context grows."""
    B, T, W = given["batch_size"], given["q_length"], local_size
    if W is None or given.get("use_vmap") or not T == given["kv_length"] > 2 * W or T % W:
        return sdpa_mask(local_size=W, **given)
    sees, padding, device = given["mask_function"], given.get("attention_mask"), given.get("device")
    if padding is not None:
        sees = and_masks(sees, padding_mask_function(padding))
    query_nW1 = torch.arange(T, device=device).view(-1, W, 1)
    key_n12W = query_nW1[:, :1] + torch.arange(-W, W, device=device)
    row_B111 = torch.arange(B, device=device).view(-1, 1, 1, 1)
    seen = sees(row_B111, torch.zeros_like(row_B111[:1]), query_nW1, key_n12W.clamp(min=0)) & (key_n12W >= 0)
    return seen.expand(B, T // W, W, 2 * W).reshape(-1, 1, W, 2 * W)


def layer_masks(
    config: MaiThinkingConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict[str, Any] | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
    *,
    half: bool,
) -> dict[str, Any]:
    """What queries may see, by kind of layer, in the form that the chosen attention function takes. `position_ids` [B,
    T] that restart inside a row keep documents apart. `half` says that layers compute in half precision on a GPU, where
    flash attention is to be had."""
    if isinstance(attention_mask, dict):  # `generate` with a static cache prepares them ahead
        return attention_mask
    whole_rows = attention_mask is None and past_key_values is None
    if whole_rows and (packed := _packed_masks(config, inputs_embeds, position_ids, half=half)):
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


ALL_ATTENTION_FUNCTIONS.register("windowed_sdpa", windowed_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register("windowed_sdpa", windowed_mask)
