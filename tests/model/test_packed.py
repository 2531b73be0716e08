"""Attention over packed documents: which blocks a query meets, and the two GPU kernels against plain attention."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mai_thinking.config.run import ExecutionSection
from mai_thinking.model.packed_attention import (
    BLOCK,
    find_documents,
    packed_attention,
    packed_block_mask,
    packed_flex,
)
from mai_thinking.training.parallel import apply_compile_and_checkpointing
from tiny_models import tiny_model

LENGTHS = [(640, 200), (640, None), (1024, 512), (300, 128), (100, 16), (513, 130)]


def packed(length: int) -> torch.Tensor:
    """Positions [3, T]: one document; several, two of them of one token; two, whose second's beginning is missing."""
    rows = ([length], [50, 1, 1, length], [length // 2 + 3, length])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row])[:length] for row in rows])
    positions[2, rows[2][0] :] += 10
    return positions


def seen(positions_BT: torch.Tensor, window: int | None) -> torch.Tensor:
    """The definition: [B, T, T] bool."""
    index = torch.arange(positions_BT.size(1), device=positions_BT.device)
    document_BT = (positions_BT.diff(dim=1, prepend=positions_BT[:, :1]) != 1).cumsum(dim=1)
    distance = index[:, None] - index
    near = (distance >= 0) & (distance < (window or len(index)))
    return near & (document_BT[:, :, None] == document_BT[:, None])


@pytest.mark.parametrize(("length", "window"), LENGTHS)
def test_blocks_are_those_that_are_seen_and_no_others(length: int, window: int | None) -> None:
    positions = packed(length)
    mask = packed_block_mask(positions, window)
    blocks = -(-length // BLOCK)
    padded = torch.zeros(3, blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    padded[:, :length, :length] = seen(positions, window)
    # What is beyond the row's end is as its last token is.
    padded[:, length:, :length] = padded[:, length - 1 : length, :length]
    tiles = padded.unflatten(2, (blocks, BLOCK)).unflatten(1, (blocks, BLOCK)).transpose(2, 3)
    found = torch.zeros(3, blocks, blocks, dtype=torch.int64)
    for kind, (counts, indices) in enumerate(
        [(mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)], start=1
    ):
        for b in range(3):
            for q in range(blocks):
                for key in indices[b, 0, q, : int(counts[b, 0, q])].tolist():
                    assert found[b, q, key] == 0
                    found[b, q, key] = kind
    assert torch.equal(found > 0, tiles.flatten(-2).any(dim=-1))
    assert torch.equal(found == 2, tiles.flatten(-2).all(dim=-1))


@pytest.mark.parametrize(("length", "window"), LENGTHS)
def test_flex_attention_against_a_mask(length: int, window: int | None) -> None:
    torch.manual_seed(0)
    positions = packed(length)
    q, k, v = (torch.randn(3, heads, length, 16) for heads in (4, 2, 2))
    got, _ = packed_flex(None, q, k, v, packed_block_mask(positions, window), 0.25)  # type: ignore[arg-type]
    torch.testing.assert_close(got, plain(q, k, v, seen(positions, window)), atol=1e-5, rtol=1e-5)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    k, v = (states.repeat_interleave(q.size(1) // k.size(1), dim=1) for states in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)


def test_where_documents_begin() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [4, 5, 0, 0, 1]])
    documents = find_documents(positions, 2, 5, positions.device)
    assert documents.offsets.tolist() == [0, 3, 5, 7, 8, 10]
    assert documents.longest == 3
    assert find_documents(None, 3, 4, positions.device).offsets.tolist() == [0, 4, 8, 12]


def test_a_model_with_flex_attention_computes_what_it_does_with_masks() -> None:
    ids = torch.randint(2, 97, (2, 150), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(70), torch.arange(80)])[None].expand(2, -1)
    with torch.no_grad():
        logits = [
            tiny_model(attention=attention)(ids, position_ids=positions, use_cache=False).logits
            for attention in ("packed_flex", "sdpa")
        ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_training_with_it_on_a_cpu_takes_masks() -> None:
    """PyTorch's flex attention has no backward there."""
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None].expand(2, -1)
    gradients = []
    for attention in ("packed_flex", "sdpa"):
        model = tiny_model(attention=attention).train()
        model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].attention.q_proj.weight.grad)
    torch.testing.assert_close(*gradients)


# --------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["flash", "flex"])
@pytest.mark.parametrize(("length", "window"), [(640, None), (640, 200), (1024, 512), (513, 130)])
def test_kernels_on_a_gpu(kernel: str, length: int, window: int | None) -> None:
    """Forward and backward against plain attention in fp32, and the same bits again."""
    torch.manual_seed(0)
    positions = packed(length).cuda()
    q, k, v = (torch.randn(3, h, length, 128, device="cuda").bfloat16().requires_grad_() for h in (4, 2, 2))
    d = torch.randn(3, length, 4, 128, device="cuda").bfloat16()

    def run(reference: bool) -> list[torch.Tensor]:
        if reference:
            out = plain(q.float(), k.float(), v.float(), seen(positions, window))
        elif kernel == "flash":
            documents = find_documents(positions, 3, length, positions.device)
            out = packed_attention(q, k, v, documents, window, 128**-0.5)
        else:
            out, _ = packed_flex(None, q, k, v, packed_block_mask(positions, window), 128**-0.5)  # type: ignore[arg-type]
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), d.to(out.dtype))]

    got, again, expected = run(False), run(False), run(True)
    for a, b in zip(got, expected, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 1e-2
    assert all(map(torch.equal, got, again))


@pytest.mark.gpu
@pytest.mark.parametrize(("attention", "compiled"), [("windowed_sdpa", False), ("packed_flex", True)])
def test_a_step_on_a_gpu(attention: str, compiled: bool) -> None:
    """bf16 autocast against fp32 on the CPU; and the same bits again, dropout included."""
    sizes: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "latent_size": 64, "moe_intermediate_size": 96}
    ids = torch.randint(2, 97, (2, 256), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(100), torch.arange(156)])[None].expand(2, -1)
    model = tiny_model(attention=attention, initializer_range=0.05, sliding_window=64, **sizes)
    batch = {"input_ids": ids, "position_ids": positions, "shift_labels": ids}

    def step(device: str) -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device == "cuda"):
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            output = model(**moved, skip_logits=True, use_cache=False)
        output.loss.backward()
        return float(output.loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.set_attn_implementation("windowed_sdpa")
    expected, _ = step("cpu")
    model.set_attn_implementation(attention)
    apply_compile_and_checkpointing(model.cuda(), ExecutionSection(compile=compiled))
    loss, _ = step("cuda")
    assert abs(loss - expected) < 0.02 * expected
    for layer in model.model.layers:
        layer.dropout.p = 0.2
    model.train()
    (first, gradients), (second, again) = step("cuda"), step("cuda")
    assert first == second != loss
    assert [name for name in gradients if not torch.equal(gradients[name], again[name])] == []
