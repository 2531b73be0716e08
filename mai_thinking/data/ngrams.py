"""Word n-grams as 64-bit hashes: shingles for MinHash, and the overlap test of decontamination."""

import re
from collections.abc import Iterable

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

MAX_OVERLAP = 0.5
"""A document that loses more than this share of its words to decontamination is dropped whole."""

_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


class WordHashes(dict[str, int]):
    """Word → 64-bit hash of its lower case; a dictionary, because words repeat and hashing each once is faster."""

    def __missing__(self, word: str) -> int:
        value = self[word] = xxhash.xxh3_64_intdigest(word.lower().encode())
        return value

    def of(self, text: str) -> Hashes:
        """The words of `text` [words], hashed."""
        words = _WORD.findall(text)
        return np.fromiter(map(self.__getitem__, words), dtype=np.uint64, count=len(words))


def ngram_hashes(words: Hashes, n: int) -> Hashes:
    """Hashes [words − n + 1] of all runs of `n` words; empty if there are fewer than `n`."""
    hashes = np.zeros(max(len(words) - n + 1, 0), dtype=np.uint64)
    if len(hashes):
        for i in range(n):
            hashes *= _MULTIPLIER
            hashes ^= words[i : i + len(hashes)]
            hashes ^= hashes >> _SHIFT
    return hashes


class OverlapIndex:
    """The word n-grams of the held-out documents, and what to do with text that contains one of them."""

    def __init__(self, n: int, hashes: Hashes) -> None:
        """`hashes`: sorted, each once, as `build` makes them and `hashes` gives them back."""
        self.n = n
        self.hashes = hashes
        self._words = WordHashes()

    @classmethod
    def build(cls, n: int, texts: Iterable[str]) -> "OverlapIndex":
        """All runs of `n` words in `texts`. A text of fewer words has none and protects nothing."""
        words = WordHashes()
        parts = [ngram_hashes(words.of(text), n) for text in texts]
        return cls(n, np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64))

    def overlap(self, text: str) -> NDArray[np.bool_]:
        """For each word of `text` [words], whether it lies in a run that is also held out."""
        words = self._words.of(text)
        covered = np.zeros(len(words), dtype=np.bool_)
        for start in np.flatnonzero(_contains(self.hashes, ngram_hashes(words, self.n))):
            covered[start : start + self.n] = True
        return covered

    def clean(self, text: str) -> str | None:
        """`text` without the lines that hold an overlap; None if that is more than `MAX_OVERLAP` of its words.

        Dropping whole documents, as is usual, would cost a quarter of a library's source for the 0.1 % that overlaps:
        a licence header, an import list. Cutting lines keeps the promise, which is that no run of `n` words of a
        held-out document is ever trained on, and costs what overlaps. Lines that become neighbours may complete a new
        run, so this repeats until nothing is found.
        """
        original = 0
        while True:
            covered = self.overlap(text)
            original = original or len(covered)
            if not covered.any():
                return text
            text = _without_lines(text, covered)
            if len(_WORD.findall(text)) < (1 - MAX_OVERLAP) * original:
                return None


def _contains(sorted_hashes: Hashes, hashes: Hashes) -> NDArray[np.bool_]:
    if not len(sorted_hashes):
        return np.zeros(len(hashes), dtype=np.bool_)
    places = np.minimum(np.searchsorted(sorted_hashes, hashes), len(sorted_hashes) - 1)
    return sorted_hashes[places] == hashes


def _without_lines(text: str, covered: NDArray[np.bool_]) -> str:
    """`text` without the lines on which a covered word stands."""
    lines = text.splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    starts = np.array([match.start() for match in _WORD.finditer(text)], dtype=np.int64)[covered]
    cut = set(np.searchsorted(ends, starts, side="right").tolist())
    return "".join(line for i, line in enumerate(lines) if i not in cut)
