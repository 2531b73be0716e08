"""Attention over packed documents on a GPU: the flash kernel that PyTorch has, told where documents begin.

It takes rows as one long sequence of documents of any length, and skips what lies outside a local layer's window.
No mask is made. It wants half precision; elsewhere the masks and kernels of `model.attention` serve.

Shapes: B rows, T tokens in a row, S = B·T tokens, N documents, H query heads, G key-value heads, d head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
