"""Nuclei against a plain sort, and draws against the distribution that they come from."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mai_thinking.rl.engine.nucleus import (
    draw,
    draw_unbranched,
    least_likely,
    pack_bits,
    pack_bits_there,
    uniforms,
    unpack_bits,
)
from mai_thinking.rl.nuclei import set_bits


def by_sorting(p_V: NDArray[np.float32], top_p: float) -> NDArray[np.bool_]:
    order = np.argsort(-p_V, kind="stable")
    size = int((np.cumsum(p_V[order].astype(np.float64)) < top_p).sum()) + 1
    mask = np.zeros(len(p_V), dtype=bool)
    mask[order[:size]] = True
    return mask


@pytest.mark.parametrize("vocab_size", [2, 97, 4096])
@pytest.mark.parametrize("spread", [0.05, 1.0, 3.0, 8.0])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(vocab_size: int, spread: float) -> None:
    """From nuclei of one token to nuclei of nearly all."""
    logits = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(0)) * spread
    for top_p in (0.2, 0.9, 0.97):
        nucleus = draw(logits, torch.full((24,), 0.5), temperature=1.0, top_p=top_p).nucleus_AV
        for row, p_V in zip(nucleus.numpy(), logits.softmax(-1).numpy(), strict=True):
            assert np.array_equal(row, by_sorting(p_V, top_p))


@pytest.mark.parametrize("vocab_size", [64, 4096])
def test_of_equals_the_first_are_in(vocab_size: int) -> None:
    """All alike, and half as likely as the other half: the surplus of ties is far more than the few that are sorted."""
    level = torch.zeros(vocab_size)
    halves = torch.cat((level[::2], level[1::2] + np.log(2.0)))
    draws = draw(torch.stack((level, halves)), torch.full((2,), 0.5), temperature=1.0, top_p=0.5)
    assert draws.nucleus_AV[0].nonzero().squeeze(1).tolist() == list(range(vocab_size // 2))
    in_second_half = round(0.5 * 1.5 * vocab_size / 2)
    first = vocab_size // 2
    got = draws.nucleus_AV[1].nonzero().squeeze(1).tolist()
    # 0.5 / (2 / 1.5 V) is a whole number of tokens but for rounding.
    assert got in (list(range(first, first + in_second_half)), list(range(first, first + in_second_half + 1)))


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_draws_follow_the_truncated_distribution(top_p: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -6.0, 0.5])
    count, temperature = 200_000, 0.7
    u = torch.from_numpy(uniforms(3, np.arange(count), np.zeros(count, dtype=np.int64)))
    draws = draw(logits.expand(count, -1), u, temperature=temperature, top_p=top_p)
    expected = (logits / temperature).softmax(-1) * draws.nucleus_AV[0]
    expected = expected / expected.sum()
    frequency = draws.tokens_A.bincount(minlength=6) / count
    assert (frequency - expected).abs().max() < 5 * (0.25 / count) ** 0.5
    assert (frequency[expected == 0] == 0).all()
    assert int((expected == 0).sum()) == (3 if top_p < 1 else 0)
    torch.testing.assert_close(draws.logprobs_A, expected.log()[draws.tokens_A])


def test_extreme_uniforms_stay_in_the_nucleus() -> None:
    logits = torch.randn(50, 4096, generator=torch.Generator().manual_seed(1))
    for u in (0.0, 1.0 - 2.0**-53):
        draws = draw(logits, torch.full((50,), u, dtype=torch.float64), temperature=1.0, top_p=0.9)
        assert draws.nucleus_AV.gather(1, draws.tokens_A[:, None]).all()
        assert draws.logprobs_A.isfinite().all()


def test_the_unbranched_draw_is_the_same() -> None:
    """Nuclei of one token to nearly all, with and without ties; where sums in another order decide, they are a
    millionth from `top_p`."""
    generator = torch.Generator().manual_seed(0)
    differing = rows = 0
    for vocab_size in (2, 97, 4096):
        u = torch.from_numpy(uniforms(7, np.arange(24), np.arange(24)))
        for spread in (0.05, 1.0, 3.0, 8.0, 60.0):
            smooth = torch.randn(24, vocab_size, generator=generator) * spread
            for logits in (smooth, smooth.round(), torch.zeros_like(smooth)):
                for top_p in (1e-6, 0.2, 0.9, 0.97, 1.0 - 1e-7, 1.0):
                    one = draw(logits, u, temperature=0.8, top_p=top_p)
                    other = draw_unbranched(logits, u, temperature=0.8, top_p=top_p)
                    alike = (one.nucleus_AV == other.nucleus_AV).all(dim=-1)
                    p = (logits / 0.8).softmax(-1)
                    for row in (~alike).nonzero().squeeze(1).tolist():
                        smaller = one.nucleus_AV[row] & other.nucleus_AV[row]
                        assert abs(float(p[row][smaller].double().sum()) - top_p) < 1e-6
                    assert torch.equal(one.tokens_A[alike], other.tokens_A[alike])
                    torch.testing.assert_close(one.logprobs_A[alike], other.logprobs_A[alike], atol=2e-6, rtol=1e-6)
                    assert other.nucleus_AV.gather(1, other.tokens_A[:, None]).all()
                    differing, rows = differing + int((~alike).sum()), rows + len(alike)
    print(f"{differing} of {rows} nuclei differ")
    assert differing < 0.02 * rows


@pytest.mark.parametrize("vocab_size", [2, 97, 4096])
@pytest.mark.parametrize("spread", [0.05, 1.0, 3.0, 8.0])
def test_the_unbranched_nucleus_is_the_smallest_set(vocab_size: int, spread: float) -> None:
    logits = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(0)) * spread
    for top_p in (0.2, 0.9, 0.97):
        nucleus = draw_unbranched(logits, torch.full((24,), 0.5), temperature=1.0, top_p=top_p).nucleus_AV
        for row, p_V in zip(nucleus.numpy(), logits.softmax(-1).numpy(), strict=True):
            assert np.array_equal(row, by_sorting(p_V, top_p))


def test_the_unbranched_draw_at_its_edges() -> None:
    logits = torch.randn(50, 4096, generator=torch.Generator().manual_seed(1))
    for u in (0.0, 1.0 - 2.0**-53):
        draws = draw_unbranched(logits, torch.full((50,), u, dtype=torch.float64), temperature=1.0, top_p=0.9)
        assert draws.nucleus_AV.gather(1, draws.tokens_A[:, None]).all()
        assert draws.logprobs_A.isfinite().all()
    greedy = torch.tensor([[0.0, 3.0, 2.9], [5.0, 1.0, 4.0]])
    for one, other in zip(
        draw(greedy, torch.full((2,), 0.99), temperature=0.0, top_p=0.97),
        draw_unbranched(greedy, torch.full((2,), 0.99), temperature=0.0, top_p=0.97),
        strict=True,
    ):
        assert torch.equal(one, other)
    for bad in (float("nan"), float("inf"), float("-inf")):
        draw_unbranched(torch.full((2, 97), bad), torch.full((2,), 0.5), temperature=1.0, top_p=0.9)


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 1.0, 4.0]])
    draws = draw(logits, torch.tensor([0.99, 0.99]), temperature=0.0, top_p=0.97)
    assert draws.tokens_A.tolist() == [1, 0]
    assert draws.logprobs_A.tolist() == [0.0, 0.0]
    assert draws.nucleus_AV.tolist() == [[False, True, False], [True, False, False]]


def test_uniforms_depend_on_seed_request_and_position_alone() -> None:
    requests, positions = (grid.ravel() for grid in np.meshgrid(np.arange(300), np.arange(300), indexing="ij"))
    u = uniforms(11, requests, positions)
    order = np.random.default_rng(0).permutation(len(u))
    assert np.array_equal(uniforms(11, requests[order], positions[order]), u[order])
    assert u.min() >= 0.0
    assert u.max() < 1.0
    assert len(np.unique(u)) == len(u)
    assert not np.isin(uniforms(12, requests, positions), u).any()
    # Uniform: 20 bins of 4,500 each, χ² with 19 degrees of freedom; neighbours in either direction do not correlate.
    counts = np.bincount((u * 20).astype(int), minlength=20)
    assert (np.square(counts - 4500) / 4500).sum() < 50
    grid = u.reshape(300, 300)
    for one, other in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid, grid.T)):
        apart = ~np.eye(300, dtype=bool)[: one.shape[0], : one.shape[1]] if one is grid else ...
        assert abs(np.corrcoef(one[apart].ravel(), other[apart].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("vocab_size", [8, 97, 4096])
def test_bits_come_back(vocab_size: int) -> None:
    mask = torch.rand(13, vocab_size, generator=torch.Generator().manual_seed(2)) < 0.3
    packed = pack_bits(mask)
    assert packed.shape == (13, -(-vocab_size // 8))
    assert np.array_equal(pack_bits_there(mask).numpy(), packed)
    assert torch.equal(unpack_bits(torch.from_numpy(packed), vocab_size), mask)
    assert np.array_equal(np.stack(set_bits(packed), axis=1), mask.nonzero().numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [97, 4096, 2**15])
def test_the_kernel_finds_the_same_end(vocab_size: int) -> None:
    for spread in (0.1, 3.0, 10.0):
        p = (spread * torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(0))).softmax(-1)
        for top_p in (0.5, 0.97, 0.999):
            found, expected = least_likely(p.cuda(), top_p).cpu(), least_likely(p, top_p)
            # Which of neighbours is the last may depend on a sum's order, the more so the more tokens share the mass.
            for bits in (found, expected):
                last, exact = bits.view(torch.float32).double(), p.double()
                assert float((exact * (exact >= last)).sum(-1).min()) > top_p - 1e-5
                assert float((exact * (exact > last)).sum(-1).max()) < top_p + 1e-5
            close = (found.view(torch.float32) / expected.view(torch.float32) - 1).abs()
            assert float(close.max()) < 0.01
