"""Drawing tokens from the nucleus, so that a draw depends on its rollout alone, and keeping the nucleus as bits.

The nucleus is the smallest set of tokens whose probability reaches `top_p`, likelier tokens first and the lower index
first among equals. The learner replays it (MAI-Thinking-1 report §3.1), so what is stored is the set that was drawn
from, not the rule.

Shapes: A rollouts that draw at once, N tokens, V vocabulary; a packed nucleus has ceil(V / 8) bytes.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

FEW = 64
"""Most nuclei of a trained model are smaller. Rows whose nucleus is not are sorted whole."""


class Draws(NamedTuple):
    """One token for each of A rollouts."""

    tokens_A: torch.Tensor
    """int64."""
    logprobs_A: torch.Tensor
    """fp32, under the distribution drawn from: with temperature, and renormalised over the nucleus."""
    nucleus_AV: torch.Tensor
    """bool."""


def draw(logits_AV: torch.Tensor, uniforms_A: torch.Tensor, *, temperature: float, top_p: float) -> Draws:
    """Draw by inverse CDF, in the order of the vocabulary, from finite fp32 logits and numbers in [0, 1).

    Temperature 0 takes the likeliest token, of a nucleus of one and with log-probability 0.
    """
    if temperature == 0.0:
        tokens_A = logits_AV.argmax(dim=-1)
        nucleus_AV = torch.zeros_like(logits_AV, dtype=torch.bool).scatter_(1, tokens_A[:, None], True)
        return Draws(tokens_A, logits_AV.new_zeros(len(tokens_A)), nucleus_AV)
    p_AV = (logits_AV / temperature).softmax(dim=-1)
    nucleus_AV = nucleus_mask(p_AV, top_p)
    kept_AV = p_AV * nucleus_AV
    cumulative_AV = kept_AV.cumsum(dim=-1)
    mass_A = cumulative_AV[:, -1]
    # The product may round up to the whole mass, which nothing exceeds.
    target_A = torch.minimum(uniforms_A.to(mass_A.dtype) * mass_A, torch.nextafter(mass_A, torch.zeros_like(mass_A)))
    # The first token whose cumulative mass exceeds the target: it has a probability above 0.
    tokens_A1 = torch.searchsorted(cumulative_AV, target_A[:, None], right=True)
    logprobs_A = (p_AV.gather(1, tokens_A1).squeeze(1) / mass_A).log()
    return Draws(tokens_A1.squeeze(1), logprobs_A, nucleus_AV)


def nucleus_mask(p_AV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The nucleus of each row of probabilities, [A, V] bool; every token where `top_p` is 1."""
    if top_p >= 1.0:
        return torch.ones_like(p_AV, dtype=torch.bool)
    size_A, least_A = _cut(_largest(p_AV, FEW), top_p)
    wide = (size_A > min(FEW, p_AV.size(1))).nonzero().squeeze(1)
    if len(wide):
        size_A[wide], least_A[wide] = _cut(_largest(p_AV[wide], p_AV.size(1)), top_p)
    size_A.clamp_(max=p_AV.size(1))  # where rounding keeps the sum of all below top_p
    mask_AV = p_AV >= least_A[:, None]
    # Of several tokens as likely as the last one that is needed, the first by index are in.
    for row in (mask_AV.sum(dim=-1) > size_A).nonzero().squeeze(1).tolist():
        ties = (p_AV[row] == least_A[row]).nonzero().squeeze(1)
        surplus = int(mask_AV[row].sum() - size_A[row])
        mask_AV[row, ties[len(ties) - surplus :]] = False
    return mask_AV


def _cut(sorted_AN: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the descending probabilities are needed to reach `top_p` (one more than there are, if they do not),
    and the last one's value."""
    size_A = (sorted_AN.cumsum(dim=-1) < top_p).sum(dim=-1) + 1
    return size_A, sorted_AN.gather(1, (size_A - 1).clamp(max=sorted_AN.size(1) - 1)[:, None]).squeeze(1)


def _largest(p_AV: torch.Tensor, k: int) -> torch.Tensor:
    """Each row's k largest values, descending."""
    k = min(k, p_AV.size(1))
    if p_AV.device.type != "cpu":
        return p_AV.topk(k, dim=-1).values
    # NumPy partitions and sorts values with vector instructions, several times faster than torch.
    values = p_AV.numpy()
    if k < values.shape[1]:
        values = np.partition(values, values.shape[1] - k, axis=-1)[:, -k:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())


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


def unpack_bits(packed_NB: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[N, ceil(V / 8)] uint8, on any device → [N, V] bool."""
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=packed_NB.device)
    bits_NB8 = packed_NB[..., None].bitwise_right_shift(shifts_8).bitwise_and_(1)
    return bits_NB8.flatten(-2)[..., :vocab_size].bool()
