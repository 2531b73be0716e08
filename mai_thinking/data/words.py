"""The words of a text in any script, and their runs, as 64-bit hashes: what documents are compared by."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Thai, Lao, Myanmar, Khmer, kana, bopomofo and Chinese characters, in blocks.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3035\u3040-\u30ff\u3100-\u312f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"(?=\w)[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_ASCII_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)
_REMEMBERED = 1_000_000
"""Words whose hashes are kept; there is no end of words in a large corpus."""


class _Unmarked(dict[int, int | None]):
    """For `str.translate`: removes accents and other marks, and invisible characters."""

    def __missing__(self, code: int) -> int | None:
        kept = None if unicodedata.category(chr(code)) in ("Mn", "Mc", "Me", "Cf") else code
        self[code] = kept
        return kept


_UNMARKED = _Unmarked()


def words_of(text: str) -> list[str]:
    """The words of `text`, in the spelling in which they are compared, but for their case."""
    if text.isascii():
        return _ASCII_WORD.findall(text)
    return _WORD.findall(unicodedata.normalize("NFKD", text).translate(_UNMARKED))


class WordHashes(dict[str, int]):
    """Word → 64-bit hash, whatever its case; a dictionary, because words repeat and hashing each once is faster."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        value = self[word] = xxhash.xxh3_64_intdigest(word.casefold().encode())
        return value

    def of(self, text: str) -> Hashes:
        """The words of `text` [words], hashed."""
        words = words_of(text)
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


def hashed_features(texts: Iterable[Hashes], *, longest: int, bits: int) -> Any:
    """Documents as vectors, from no model but what is counted here: of texts as hashed words a sparse matrix
    [texts, 2^bits] float32, 1 + the logarithm of how often each run of up to `longest` words stands in a text. Words
    that share a column are told apart by the others."""
    from scipy.sparse import csr_matrix  # half a second, and only for those who ask

    shift = np.uint64(64 - bits)
    columns, values, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)], [0]
    for words in texts:
        runs = np.concatenate([ngram_hashes(words, n) for n in range(1, longest + 1)]) >> shift
        column, count = np.unique(runs, return_counts=True)
        columns.append(column.astype(np.int32))
        values.append(1 + np.log(count, dtype=np.float32))
        sizes.append(len(column))
    shape = (len(sizes) - 1, 1 << bits)
    return csr_matrix((np.concatenate(values), np.concatenate(columns), np.cumsum(sizes)), shape=shape)


@contextmanager
def one_thread() -> Iterator[None]:
    """Products and factors of matrices are the same bits on any number of cores: in parts, sums end otherwise, and a
    cluster's border lies elsewhere. Those of a few thousand documents take no longer."""
    import sklearn.cluster  # noqa: F401 — with SciPy, whose threads would not be limited if it came later
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


class SortedHashes:
    """Hashes that others are looked up in; most are seen not to be there without a search."""

    def __init__(self, hashes: Hashes) -> None:
        """`hashes`: in order; one may be there more than once."""
        self._hashes = hashes
        self._maybe = np.zeros(1 << min(max(len(hashes).bit_length() + 3, 12), 26), dtype=np.bool_)
        self._shift = np.uint64(65 - len(self._maybe).bit_length())
        self._maybe[hashes >> self._shift] = True

    def places(self, hashes: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each [hashes] the first place, and how often it is there."""
        first, counts = np.zeros((2, len(hashes)), dtype=np.int64)
        some = np.flatnonzero(self._maybe[hashes >> self._shift])
        first[some] = np.searchsorted(self._hashes, hashes[some])
        counts[some] = np.searchsorted(self._hashes, hashes[some], side="right") - first[some]
        return first, counts


class RunCounts:
    """In how many documents a run of words, or a line, stands, up to 255: a table of a byte each, found by their hash.

    At most 2²⁸ bytes, whatever there is to count; two that share one are counted together.
    """

    def __init__(self, table: NDArray[np.uint8]) -> None:
        self.table = table
        self._shift = np.uint64(65 - len(table).bit_length())

    @classmethod
    def empty(cls, size: int) -> Self:
        """Nothing counted, in a table of this size."""
        return cls(np.zeros(size, dtype=np.uint8))

    @classmethod
    def expecting(cls, count: int) -> Self:
        """For about so many different ones."""
        return cls.empty(1 << min(max(count.bit_length() + 1, 16), 28))

    def in_documents(self, documents: Iterable[Hashes]) -> dict[str, NDArray[np.unsignedinteger]]:
        """`slots` where something of these documents is counted, and `times`, in how many of them it stands."""
        found = [np.unique(hashes >> self._shift).astype(np.uint32) for hashes in documents]
        slots, times = np.unique(np.concatenate(found), return_counts=True)
        return {"slots": slots, "times": np.minimum(times, 255).astype(np.uint8)}

    def add(self, slots: NDArray[np.unsignedinteger], times: NDArray[np.integer]) -> None:
        """Count each slot, which is there once, so many times."""
        self.table[slots] = np.minimum(self.table[slots] + times.astype(np.int64), 255)

    def save_sum(self, parts: Any, path: Path) -> None:
        """Add what `in_documents` gave for each shard (`Parts`), and write the table."""
        for slots, times in zip(parts.each("slots"), parts.each("times"), strict=True):
            self.add(slots, times)
        with path.open("wb") as file:
            np.save(file, self.table)

    def of(self, hashes: Hashes) -> NDArray[np.uint8]:
        """The counts [hashes]."""
        return self.table[hashes >> self._shift]
