"""Words, their runs as 64-bit hashes, and the removal of held-out text from training text. MAI-Thinking-1 report §2.4.

The promise: no run of `n` words of a held-out document or benchmark is trained on, nor the whole of a shorter text that
has `SHORTEST` words. Case, accents, punctuation, line ends and invisible characters do not matter. A character of a
script that is written without spaces counts as a word.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from mai_thinking.data.jsonl import read_json, read_jsonl, read_text

Hashes = NDArray[np.uint64]

SHORTEST = 8
"""Words of the shortest text that is looked for, as GPT-3's paper has it: fewer stand in innocent text by chance."""
MAX_OVERLAP = 0.5
"""A document that loses more than this share of its words to decontamination is dropped whole."""

# Thai, Lao, Myanmar, Khmer, kana, bopomofo and Chinese characters, in blocks.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3035\u3040-\u30ff\u3100-\u312f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"(?=\w)[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_ASCII_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


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


class OverlapIndex:
    """What must not be trained on, and what to do with text that contains it."""

    def __init__(self, runs: Mapping[str, Hashes]) -> None:
        """`runs`: by number of words (as text), the sorted hashes of the runs of this length."""
        self.runs = runs
        self._words = WordHashes()

    @classmethod
    def build(cls, n: int, texts: Iterable[str]) -> "OverlapIndex":
        """All runs of `n` words in `texts`; the whole of shorter ones; nothing of those below `SHORTEST`."""
        words = WordHashes()
        found: list[tuple[int, Hashes]] = []
        for text in texts:
            hashed = words.of(text)
            length = min(n, len(hashed))
            if length >= min(n, SHORTEST):
                found.append((length, ngram_hashes(hashed, length)))
        found.sort(key=lambda pair: pair[0])
        runs = groupby(found, key=lambda pair: pair[0])
        return cls({str(length): np.unique(np.concatenate([part for _, part in parts])) for length, parts in runs})

    def overlap(self, text: str) -> NDArray[np.bool_]:
        """For each word of `text` [words], whether it lies in a run that is also held out."""
        words = self._words.of(text)
        covered = np.zeros(len(words), dtype=np.bool_)
        for length, known in self.runs.items():
            for start in np.flatnonzero(_contains(known, ngram_hashes(words, int(length)))):
                covered[start : start + int(length)] = True
        return covered

    def clean(self, text: str) -> str | None:
        """`text` without the lines that hold an overlap; None if that is more than `MAX_OVERLAP` of its words.

        Dropping whole documents, as is usual, would cost a quarter of a library's source for the 0.1 % that overlaps:
        a licence header, an import list. Cutting lines keeps the promise and costs what overlaps. Lines that become
        neighbours may complete a new run, so this repeats until nothing is found.
        """
        original = 0
        while (covered := self.overlap(text)).any():
            original = original or len(covered)
            lines = text.splitlines(keepends=True)
            ends = np.cumsum([len(words_of(line)) for line in lines])
            cut = set(np.searchsorted(ends, np.flatnonzero(covered), side="right").tolist())
            text = "".join(line for i, line in enumerate(lines) if i not in cut)
            if len(words_of(text)) < (1 - MAX_OVERLAP) * original:
                return None
        return text


def _contains(sorted_hashes: Hashes, hashes: Hashes) -> NDArray[np.bool_]:
    places = np.minimum(np.searchsorted(sorted_hashes, hashes), len(sorted_hashes) - 1)
    return sorted_hashes[places] == hashes


# --------------------------------------------------------------------------------------------------------- benchmarks


def read_benchmark(path: Path) -> list[list[str]]:
    """The strings of each record of a benchmark: of JSONL, JSON (a list of records, or one) or text, also gzipped.

    The lines of a text file count by themselves as well, for files with a question a line.
    """
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return [list(_strings(line.value)) for line in read_jsonl(path)]
    if name.endswith(".json"):
        tree = read_json(path)
        return [list(_strings(record)) for record in (tree if isinstance(tree, list) else [tree])]
    text = read_text(path)
    return [[text, *text.splitlines()]]


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
