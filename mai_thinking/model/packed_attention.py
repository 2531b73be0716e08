"""Attention over packed documents on a GPU, by two kernels that PyTorch has. Elsewhere `model.attention` serves.

The flash kernel, for half precision, is told where documents begin. It takes rows as one long sequence of documents of
any length, and skips what lies outside a local layer's window. No mask is made.

Flex attention, "packed_flex", is for compiled training. A block mask says which blocks of keys a block of queries
meets, and which of those it sees whole. The library's way to make one asks every pair of tokens; here it follows from
where documents begin, a few numbers a block. Of a query q whose document begins at start(q), a layer with window W sees
the keys from max(start(q), q − W + 1) to q. Both grow with q. So the first query of a block says where the keys begin
that any of the block sees, and the last one from where on all of the block see all.

Shapes: B rows, T tokens in a row, S = B·T tokens, N documents, n = ceil(T / BLOCK) blocks, H query heads, G key-value
heads, d head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mai_thinking.model.fused import fused

BLOCK = 128


class Documents(NamedTuple):
    """Where documents begin in rows laid end to end; takes a mask's place in the layers. Each document's first token
    among S, and S, int32 [N + 1] on the rows' device; and the longest one's length, a scalar on the CPU, where it is
    read without waiting for the device."""

    offsets: Tensor
    longest: Tensor


def document_begins(position_ids_BT: Tensor) -> Tensor:
    """[B, T] bool: a document begins at a row's start and wherever positions do not go on by one."""
    begins_BT = torch.ones_like(position_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = position_ids_BT[:, 1:] != position_ids_BT[:, :-1] + 1
    return begins_BT


def find_documents(position_ids_BT: Tensor | None, rows: int, length: int, device: torch.device) -> Documents:
    """Of rows [B, T], or [1, T] if they are alike; without positions, a row is one document. Waits for the device."""
    if position_ids_BT is None:
        offsets = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)
        return Documents(offsets, torch.tensor(length))
    begins_BT = document_begins(position_ids_BT).expand(rows, -1)
    starts = begins_BT.flatten().nonzero().squeeze(1)
    offsets = torch.cat((starts, starts.new_tensor([rows * length]))).to(torch.int32)
    torch._dynamo.mark_dynamic(offsets, 0)  # another micro-batch has another number of documents
    return Documents(offsets, offsets.diff().max().cpu())


def packed_attention(
    q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, documents: Documents, window: int | None, scale: float
) -> Tensor:
    """Causal attention within documents, of each token to itself and the `window` − 1 before it → [B, T, H, d]."""
    B, _, T, _ = q_BHTd.shape
    q, k, v = (states.transpose(1, 2).flatten(0, 1).contiguous() for states in (q_BHTd, k_BGTd, v_BGTd))
    out_SHd, _ = _attend(q, k, v, *documents, -1 if window is None else window - 1, scale)
    return out_SHd.unflatten(0, (B, T))


@torch.library.custom_op("mai_thinking::packed_attention", mutates_args=(), device_types="cuda")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: Tensor, before: int, scale: float
) -> tuple[Tensor, Tensor]:
    """[S, H, d], [S, G, d] twice → outputs [S, H, d] and the log-sums of exponentials [H, S] fp32; `before` tokens are
    seen besides the own, −1 for all."""
    most = int(longest)
    out, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, most, most, 0.0, True, False, scale=scale, **_window(before)
    )
    return out, log_sums


_attend.register_fake(lambda q, *_: (torch.empty_like(q), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)))


@torch.library.custom_op("mai_thinking::packed_attention_backward", mutates_args=(), device_types="cuda")
def _attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    offsets: Tensor,
    longest: Tensor,
    before: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """→ gradients like q, k and v."""
    most = int(longest)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    with _same_bits():
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            d_out.contiguous(), q, k, v, out, log_sums, offsets, offsets, most, most, 0.0, True, no_dropout,
            q.new_empty(0), scale=scale, **_window(before),
        )  # fmt: skip
    return dq, dk, dv


def _window(before: int) -> dict[str, int | None]:
    return {"window_size_left": None if before < 0 else before, "window_size_right": None if before < 0 else 0}


@contextmanager
def _same_bits() -> Iterator[None]:
    """The kernel can add up in a fixed order, at no cost that shows, but asks for that where all of torch is asked."""
    settings: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill


_attend_backward.register_fake(
    lambda d_out, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, longest, ctx.before, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, offsets, longest)


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = _attend_backward(d_out, *ctx.saved_tensors, ctx.before, ctx.scale)
    return dq, dk, dv, None, None, None, None


_attend.register_autograd(_differentiate, setup_context=_keep)


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
