"""Text that shares most of a run of words with a held-out text, though some were changed. MAI-Thinking-1 report §2.4.4.

A run of `n` words of which a share `s` is kept has `ceil(s n / (n − s n + 1))` in a row that are: 4 of 20 at 80 %. Such
seeds are looked up; around each the words are compared, a few places more or less.
"""

import math

import numpy as np
from numpy.typing import NDArray

from mai_thinking.config.data import FuzzySection
from mai_thinking.data.words import Hashes, SortedHashes, ngram_hashes

_SHIFTS = 2
"""So many words may have been put in or left out on the way."""
_COMMON = 32
"""A seed that stands in the held-out text more often is no evidence: `for i in range`."""
_CHUNK = 4096
"""Seeds whose surroundings are compared at once."""


class FuzzyIndex:
    """The held-out texts as one sequence of words, and where each seed stands in it."""

    def __init__(self, words: Hashes, section: FuzzySection) -> None:
        """`words`: the texts' hashed words, as `joined` makes them."""
        n = section.ngram
        self.words, self.section = words, section
        self.seed = max(2, math.ceil(section.share * n / (n - section.share * n + 1)))
        seeds = ngram_hashes(words, self.seed)
        starts = np.flatnonzero(words == 0)
        inside = np.ones(len(seeds), dtype=np.bool_)
        for i in range(self.seed):
            inside &= words[i : i + len(seeds)] != 0
        places = np.flatnonzero(inside)
        order = np.argsort(seeds[places], kind="stable")
        self._places, self._seeds = places[order], SortedHashes(seeds[places][order])
        ends = np.append(starts, len(words))
        after = np.searchsorted(ends, self._places)
        before = np.where(after > 0, ends[after - 1], -1)
        length = np.minimum(ends[after] - before - 1, n)
        self._needed = np.ceil(section.share * length - 1e-9).astype(np.int64)
        """By seed: so many words of a run must be the text's; fewer where the whole text is shorter."""

    @staticmethod
    def joined(texts: list[Hashes]) -> Hashes:
        """One after the other, with a zero, which is no word, before each."""
        zero = np.zeros(1, dtype=np.uint64)
        return np.concatenate([part for text in texts for part in (zero, text)] or [zero])

    def overlap(self, words: Hashes) -> NDArray[np.bool_]:
        """For each word [words], whether it lies in a run that is held out but for a few changes."""
        covered = np.zeros(len(words), dtype=np.bool_)
        n = self.section.ngram
        here, row = self._hits(words)
        reach = np.arange(-(n - self.seed), n)
        for a in range(0, len(here), _CHUNK):
            at, rows = here[a : a + _CHUNK, None] + reach, row[a : a + _CHUNK]
            theirs = self._places[rows][:, None] + reach
            mine = _taken(words, at)
            same = np.zeros(at.shape, dtype=np.bool_)
            for shift in range(-_SHIFTS, _SHIFTS + 1):
                same |= mine == _taken(self.words, theirs + shift)
            same &= mine != 0
            sums = np.cumsum(np.pad(same, ((0, 0), (1, 0))), axis=1)
            runs = sums[:, n:] - sums[:, :-n] >= self._needed[rows][:, None]
            for start in range(runs.shape[1]):
                found = at[runs[:, start], start : start + n][same[runs[:, start], start : start + n]]
                covered[found] = True
        return covered

    def _hits(self, words: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places in `words` with a seed, and its rows in the index; of a passage that goes on, every eighth."""
        seeds = ngram_hashes(words, self.seed)
        first, counts = self._seeds.places(seeds)
        counts[counts > _COMMON] = 0
        here = np.repeat(np.arange(len(seeds)), counts)
        row = np.arange(len(here)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        goes_on = _taken(words, here - 1) == self.words[self._places[row] - 1]
        wanted = ~goes_on | (here % 8 == 0)
        return here[wanted], row[wanted]


def _taken(words: Hashes, at: NDArray[np.int64]) -> Hashes:
    """`words[at]`, and zero outside."""
    inside = (at >= 0) & (at < len(words))
    return np.where(inside, words[np.clip(at, 0, max(len(words) - 1, 0))], np.uint64(0))
