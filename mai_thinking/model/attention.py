"""Grouped-query attention: local layers with RoPE and a window, global layers without positions.

Source: MAI-Thinking-1 report §2.1. Kernels, masks and caches are the transformers library's, chosen by
`config._attn_implementation` ("sdpa", "eager", "flash_attention_2", "flex_attention", ...).

Shapes: B batch, T queries, H query heads, G key-value heads, d head size.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mai_thinking.model.configuration import LOCAL, MaiThinkingConfig
from mai_thinking.model.norm import RMSNorm
from mai_thinking.model.projection import residual_projection

RotaryTables = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """One attention sublayer, [B, T, D] → [B, T, D], without its norms.

    Queries and keys pass an RMSNorm per head. Layers of kind "sliding_attention" rotate them by position; the global
    ones see no positions at all, so that they extend to any length.
    """

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
        x_BTD: torch.Tensor,
        rotary: RotaryTables,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        heads = (*x_BTD.shape[:-1], -1, self.head_dim)
        q_BHTd = self.q_norm(self.q_proj(x_BTD).view(heads)).transpose(1, 2)
        k_BGTd = self.k_norm(self.k_proj(x_BTD).view(heads)).transpose(1, 2)
        v_BGTd = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        if self.is_local:
            q_BHTd, k_BGTd = rotate(q_BHTd, rotary), rotate(k_BGTd, rotary)
        # The norms and the rotation are fp32; the kernel takes one dtype and keeps its scores in fp32 by itself.
        q_BHTd, k_BGTd = q_BHTd.to(v_BGTd.dtype), k_BGTd.to(v_BGTd.dtype)
        if past_key_values is not None:
            k_BGTd, v_BGTd = past_key_values.update(k_BGTd, v_BGTd, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        heads_BTHd, _ = attend(
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
        return self.o_proj(heads_BTHd.flatten(2))


def rotary_tables(position_ids: torch.Tensor, head_dim: int, theta: float) -> RotaryTables:
    """cos and sin, each [B, 1, T, d] in fp32, of the angles position · theta^(−2i/d), for integer positions [B, T]."""
    pairs = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angles_BTp = position_ids[..., None].float() * theta ** (-pairs / head_dim)
    angles_B1Td = torch.cat((angles_BTp, angles_BTp), dim=-1)[:, None]
    return angles_B1Td.cos(), angles_B1Td.sin()


def rotate(x_BHTd: torch.Tensor, rotary: RotaryTables) -> torch.Tensor:
    """RoPE: dimension i and i + d/2 of each head turn together by their position's angle."""
    cos, sin = rotary
    first, second = x_BHTd.chunk(2, dim=-1)
    return x_BHTd * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain products, for `attn_implementation="eager"`: outputs [B, T, H, d] and weights."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = (query.float() @ key.float().transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights
