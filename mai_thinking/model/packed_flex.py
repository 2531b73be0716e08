"""Attention over packed documents by PyTorch's flex attention, for compiled training on a GPU: "packed_flex".

A block mask says which blocks of keys a block of queries meets, and which of those it sees whole. The library's way to
make one asks every pair of tokens; here it follows from where documents begin, a few numbers a block.

Of a query q whose document begins at start(q), a layer with window W sees the keys from max(start(q), q − W + 1) to q.
Both grow with q. So the first query of a block says where the keys begin that any of the block sees, and the last one
from where on all of the block see all.

Shapes: B rows, T tokens in a row, n = ceil(T / BLOCK) blocks, H query heads, G key-value heads, d head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mai_thinking.model.fused import fused
from mai_thinking.model.packed_attention import document_begins

BLOCK = 128


def packed_block_mask(position_ids_BT: Tensor, window: int | None) -> BlockMask:
    """The mask of a layer with that window, or of a global one, for rows [B, T] of documents (`document_begins`)."""
    B, T = position_ids_BT.shape
    device = position_ids_BT.device
    index_T = torch.arange(T, device=device)
    start_BT = torch.where(document_begins(position_ids_BT), index_T, 0).cummax(dim=1).values.to(torch.int32)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        within = (k <= q) & (k >= start_BT[b, q])
        return within if window is None else within & (q - k < window)

    first_BT = start_BT if window is None else torch.maximum(start_BT, (index_T - window + 1).to(torch.int32))
    blocks = -(-T // BLOCK)
    own_n = torch.arange(blocks, device=device)
    last_n = (own_n * BLOCK + BLOCK - 1).clamp(max=T - 1)
    begin_Bn = first_BT[:, own_n * BLOCK] // BLOCK
    # A block before the own one is seen whole from where the last query's keys begin; the own one never is.
    whole_Bn = torch.minimum(-(-first_BT[:, last_n] // BLOCK), own_n)
    j_n = own_n.expand(B, blocks, blocks)
    is_whole = (j_n >= whole_Bn[..., None]) & (j_n < own_n[:, None])
    is_part = (j_n >= begin_Bn[..., None]) & (j_n <= own_n[:, None]) & ~is_whole
    return BlockMask.from_kv_blocks(
        *_blocks(is_part), *_blocks(is_whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, T)
    )


def _blocks(chosen_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, 1, n] and, in front, indices [B, 1, n, n] of each row's chosen blocks; int32."""
    counts = chosen_Bnn.sum(dim=-1, dtype=torch.int32)
    indices = (~chosen_Bnn).to(torch.int8).argsort(dim=-1, stable=True).to(torch.int32)
    return counts[:, None], indices[:, None]


def packed_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, H, T, d], [B, G, T, d] twice → [B, T, H, d]. Without a block mask, as in generation, the library's SDPA."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Not compiled, it would hold all scores.
    alone = query.is_cuda and not torch.compiler.is_compiling()
    attend: Any = fused(flex_attention) if alone else flex_attention
    out_BHTd = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out_BHTd.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("packed_flex", packed_flex)
ALL_MASK_ATTENTION_FUNCTIONS.register("packed_flex", sdpa_mask)
