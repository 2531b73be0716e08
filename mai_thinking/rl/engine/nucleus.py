"""Drawing tokens from the nucleus, so that a draw depends on its rollout alone, and keeping the nucleus as bits.

The nucleus is the smallest set of tokens whose probability reaches `top_p`, likelier tokens first and the lower index
first among equals. The learner replays it (MAI-Thinking-1 report §3.1), so what is stored is the set that was drawn
from, not the rule.

Shapes: A rollouts that draw at once, N tokens, V vocabulary; a packed nucleus has ceil(V / 8) bytes.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

FEW = 32  # Most nuclei of a trained model are smaller; larger ones take more work
BISECTIONS = 9  # Usually enough to come within `FEW` tokens of the nucleus's end
BLOCKS = 256
"""Blocks that the vocabulary is cut into, to find the few likeliest tokens in the blocks with the largest maxima."""

UNITS = 2.0**40
"""What a probability of 1 counts in integers: less than a millionth of a millionth of the mass is rounded away."""


class Draws(NamedTuple):
    """One token for each of A rollouts."""

    tokens_A: torch.Tensor  # int64
    logprobs_A: torch.Tensor
    """fp32, under the distribution drawn from: with temperature, and renormalised over the nucleus."""
    nucleus_AV: torch.Tensor  # bool


def draw(logits_AV: torch.Tensor, uniforms_A: torch.Tensor, *, temperature: float, top_p: float) -> Draws:
    """Draw by inverse CDF, in the order of the vocabulary, from finite fp32 logits and numbers in [0, 1).

    Temperature 0 takes the likeliest token, of a nucleus of one and with log-probability 0.
    """
    if logits_AV.device.type != "cpu" or temperature == 0.0:
        return draw_unbranched(logits_AV, uniforms_A, temperature=temperature, top_p=top_p)
    p_AV = (logits_AV / temperature).softmax(dim=-1)
    inside_AV = _nucleus(p_AV, top_p)
    cumulative_AV = (p_AV * inside_AV).cumsum(dim=-1)
    mass_A = cumulative_AV[:, -1]
    # The product may round up to the whole mass, which nothing exceeds.
    target_A = torch.minimum(uniforms_A.to(mass_A.dtype) * mass_A, torch.nextafter(mass_A, torch.zeros_like(mass_A)))
    # The first token whose cumulative mass exceeds the target: it has a probability above 0.
    tokens_A1 = torch.searchsorted(cumulative_AV, target_A[:, None], right=True)
    logprobs_A = (p_AV.gather(1, tokens_A1).squeeze(1) / mass_A).log()
    return Draws(tokens_A1.squeeze(1), logprobs_A, inside_AV.bool())


def draw_unbranched(logits_AV: torch.Tensor, uniforms_A: torch.Tensor, *, temperature: float, top_p: float) -> Draws:
    """`draw` without a branch or a shape that depends on the data: a GPU need not wait for the host, and its work can
    be recorded. Rows of logits that are not finite give anything, but no error.

    A GPU sums in an order of its own, so the cumulative mass is counted in integers: in floats, a token outside the
    nucleus could seem to add to it, and be drawn.
    """
    if temperature == 0.0:
        tokens_A1 = logits_AV.argmax(dim=-1, keepdim=True)
        nucleus_AV = torch.zeros_like(logits_AV, dtype=torch.bool).scatter_(1, tokens_A1, True)
        return Draws(tokens_A1.squeeze(1), logits_AV.new_zeros(logits_AV.size(0)), nucleus_AV)
    p_AV = (logits_AV / temperature).softmax(dim=-1)
    inside_AV = _nucleus_unbranched(p_AV, top_p)
    p_inside_AV = p_AV * inside_AV
    cumulative_AV = (p_inside_AV * UNITS).long().cumsum(dim=-1)
    units_A = cumulative_AV[:, -1]
    target_A = torch.minimum((uniforms_A.double() * units_A).long(), units_A - 1)
    tokens_A1 = torch.searchsorted(cumulative_AV, target_A[:, None], right=True).clamp_(max=p_AV.size(1) - 1)
    logprobs_A = (p_AV.gather(1, tokens_A1).squeeze(1) / p_inside_AV.sum(dim=-1)).log()
    return Draws(tokens_A1.squeeze(1), logprobs_A, inside_AV)


def _nucleus_unbranched(p_AV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The nucleus of each row of probabilities, [A, V] bool."""
    if top_p >= 1.0:
        return torch.ones_like(p_AV, dtype=torch.bool)
    p_AV = p_AV.contiguous()
    bits_AV, least_A1 = p_AV.view(torch.int32), least_likely(p_AV, top_p)
    above_AV, level_AV = bits_AV > least_A1, bits_AV == least_A1
    # Of several tokens as likely as the last one that is needed, the first by index are in.
    missing_A1 = top_p - (p_AV * above_AV).sum(dim=-1, keepdim=True)
    needed_A1 = (missing_A1 / least_A1.view(torch.float32)).ceil().clamp(min=1.0, max=p_AV.size(1))
    return above_AV | (level_AV & (level_AV.cumsum(dim=-1, dtype=torch.int32) <= needed_A1))


def least_likely(p_AV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The largest probability above which, itself included, `top_p` lies, of each row; its bits, [A, 1] int32.

    The bits of non-negative floats order like integers: they are settled one by one from the highest down. That is far
    less work on a GPU than a sort.
    """
    if p_AV.is_cuda:
        from mai_thinking.rl.engine import nucleus_kernel  # brings Triton, which only builds for a GPU have

        return nucleus_kernel.least_likely(p_AV, top_p)
    bits_AV = p_AV.view(torch.int32)
    least_A1 = torch.zeros_like(bits_AV[:, :1])
    for bit in range(29, -1, -1):  # probabilities are below 2, whose bits are 2 ** 30
        higher_A1 = least_A1 + 2**bit
        enough_A1 = (p_AV * (bits_AV >= higher_A1)).sum(dim=-1, keepdim=True) >= top_p
        least_A1 = higher_A1.where(enough_A1, least_A1)
    return least_A1


def _nucleus(p_AV: torch.Tensor, top_p: float) -> torch.Tensor:
    """1 in the nucleus of each row of probabilities and 0 outside, [A, V]; 1 everywhere where `top_p` is 1.

    In the probabilities' dtype: on a CPU, products and sums of booleans are several times slower.
    """
    if top_p >= 1.0:
        return torch.ones_like(p_AV)
    few_AF = _few_largest(p_AV)
    size_A, least_A = _cut(few_AF, top_p)
    wide = (size_A > FEW).nonzero().squeeze(1)
    if len(wide):
        size_A[wide], least_A[wide] = _cut_wide(p_AV[wide], few_AF[wide, -1], top_p)
    size_A.clamp_(max=p_AV.size(1))  # where rounding keeps the sum of all below top_p
    inside_AV = p_AV.clone().ge_(least_A[:, None])
    # Of several tokens as likely as the last one that is needed, the first by index are in.
    surplus_A = inside_AV.sum(dim=-1).long() - size_A
    for row in surplus_A.nonzero().squeeze(1).tolist():
        ties = (p_AV[row] == least_A[row]).nonzero().squeeze(1)
        inside_AV[row, ties[len(ties) - int(surplus_A[row]) :]] = 0.0
    return inside_AV


def _cut_wide(p_AV: torch.Tensor, high_A: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`_cut` of rows whose nucleus goes beyond the `FEW` likeliest tokens, down to `high_A`, without sorting the rows.

    Bisects, on a logarithmic scale, for a probability above which not enough lies, but few tokens short of it.
    """
    # Tokens less likely than this hold less than 1 − top_p, even all together.
    low_A = torch.full_like(high_A, 0.5 * (1.0 - top_p) / p_AV.size(1))
    scratch_AV = torch.empty_like(p_AV)
    for _ in range(BISECTIONS):
        middle_A = (low_A * high_A).sqrt()
        enough_A = scratch_AV.copy_(p_AV).ge_(middle_A[:, None]).mul_(p_AV).sum(dim=-1) >= top_p
        low_A, high_A = torch.where(enough_A, middle_A, low_A), torch.where(enough_A, high_A, middle_A)
    above_AV = p_AV.clone().ge_(high_A[:, None])
    count_A = above_AV.sum(dim=-1).long()
    mass_A1 = above_AV.mul_(p_AV).sum(dim=-1, keepdim=True)
    size_A, least_A = _cut(_few_largest(p_AV - above_AV), top_p - mass_A1)
    # More than a few short of it, or, with many tokens as likely as `high_A`, already beyond it.
    unclear = ((size_A > FEW) | (mass_A1.squeeze(1) >= top_p)).nonzero().squeeze(1)
    size_A += count_A
    if len(unclear):
        # NumPy's sort is three times as fast as torch's.
        descending = np.sort(p_AV[unclear].numpy(), axis=-1)[:, ::-1].copy()
        size_A[unclear], least_A[unclear] = _cut(torch.from_numpy(descending), top_p)
    return size_A, least_A


def _cut(sorted_AN: torch.Tensor, top_p: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the descending probabilities are needed to reach `top_p` (one more than there are, if they do not),
    and the last one's value."""
    size_A = (sorted_AN.cumsum(dim=-1) < top_p).sum(dim=-1) + 1
    return size_A, sorted_AN.gather(1, (size_A - 1).clamp(max=sorted_AN.size(1) - 1)[:, None]).squeeze(1)


def _few_largest(p_AV: torch.Tensor) -> torch.Tensor:
    """Each row's largest values, descending, `FEW` of them; a third of `topk`'s time over a large vocabulary."""
    A, V = p_AV.shape
    if V % BLOCKS or V < 4 * BLOCKS:
        return p_AV.topk(min(FEW, V), dim=-1).values
    # Block b has tokens b, b + BLOCKS, ... The k blocks with the largest maxima hold the k largest values.
    blocks_AnB = p_AV.view(A, -1, BLOCKS)
    likely_AF = blocks_AnB.amax(dim=1).topk(FEW, dim=-1).indices
    within = blocks_AnB.gather(2, likely_AF[:, None].expand(-1, blocks_AnB.size(1), -1))
    return within.flatten(1).topk(FEW, dim=-1).values


def uniforms(seed: int, request_ids_A: NDArray[np.int64], positions_A: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, request, position), by hashing them: no generator, so no order of draws."""
    with np.errstate(over="ignore"):
        state_A = _mix(np.asarray([seed % 2**64], dtype=np.uint64))
        state_A = _mix(state_A ^ _mix(request_ids_A.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
        state_A = _mix(state_A + (positions_A.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (state_A >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit changes half of the output bits (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pack_bits(mask_NV: torch.Tensor) -> NDArray[np.uint8]:
    """[N, V] bool → [N, ceil(V / 8)]; token v is bit v % 8 of byte v // 8."""
    return np.packbits(mask_NV.cpu().numpy(), axis=-1, bitorder="little")


def pack_bits_there(mask_NV: torch.Tensor) -> torch.Tensor:
    """`pack_bits` on the mask's own device, → uint8."""
    bits_NB8 = F.pad(mask_NV.to(torch.uint8), (0, -mask_NV.size(1) % 8)).unflatten(1, (-1, 8))
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=mask_NV.device)
    return bits_NB8.bitwise_left_shift(shifts_8).sum(dim=-1).to(torch.uint8)


def unpack_bits(packed_NB: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[N, ceil(V / 8)] uint8, on any device → [N, V] bool."""
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=packed_NB.device)
    bits_NB8 = packed_NB[..., None].bitwise_right_shift(shifts_8).bitwise_and_(1)
    return bits_NB8.flatten(-2)[..., :vocab_size].bool()
