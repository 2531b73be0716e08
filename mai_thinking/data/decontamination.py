"""The removal of held-out text from training text. MAI-Thinking-1 report §2.4.4.

The promise: no run of `n` words of a held-out document or benchmark is trained on, nor the whole of a shorter text that
has `SHORTEST` words. Case, accents, punctuation, line ends and invisible characters do not matter. A character of a
script that is written without spaces counts as a word.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mai_thinking.config.data import CleaningSection, FuzzySection
from mai_thinking.data.accounting import LeftOut
from mai_thinking.data.documents import DECONTAMINATED, Documents, rewritten
from mai_thinking.data.jsonl import read_json, read_jsonl, read_text
from mai_thinking.data.words import Hashes, SortedHashes, WordHashes, ngram_hashes, words_of
from mai_thinking.data.work import Arrays

SHORTEST = 8
"""Words of the shortest text that is looked for, as GPT-3's paper has it: fewer stand in innocent text by chance."""
MAX_OVERLAP = 0.5
"""A document that loses more than this share of its words to decontamination is dropped whole."""
_FUZZY = "fuzzy"
_SHIFTS = 2
"""So many words may have been put in or left out on the way."""
_COMMON = 32
"""A seed that stands in the held-out text more often is no evidence: `for i in range`."""
_CHUNK = 4096
"""Seeds whose surroundings are compared at once."""


class OverlapIndex:
    """What must not be trained on, and what to do with text that contains it."""

    def __init__(self, runs: Mapping[str, Hashes], fuzzy: "FuzzyIndex | None") -> None:
        """`runs`: by number of words (as text), the sorted hashes of the runs of this length."""
        self.runs, self.fuzzy = runs, fuzzy
        self._known = {int(length): SortedHashes(hashes) for length, hashes in runs.items()}
        self._words = WordHashes()

    @classmethod
    def of(cls, cleaning: CleaningSection, texts: Iterable[str]) -> "OverlapIndex | None":
        """What `cleaning` looks for of `texts`; None if that is nothing. All runs of `decontamination_ngram` words,
        the whole of shorter texts, nothing of those below `SHORTEST`."""
        n, section, words = cleaning.decontamination_ngram, cleaning.fuzzy_decontamination, WordHashes()
        if n is None and section is None:
            return None
        hashed = [words.of(text) for text in texts]
        found: defaultdict[int, list[Hashes]] = defaultdict(list)
        for text in hashed:
            if n is not None and len(text) >= min(n, SHORTEST):
                found[min(n, len(text))].append(ngram_hashes(text, min(n, len(text))))
        runs = {str(length): np.unique(np.concatenate(parts)) for length, parts in sorted(found.items())}
        long = [text for text in hashed if len(text) >= SHORTEST]
        return cls(runs, FuzzyIndex(FuzzyIndex.joined(long), section) if section is not None else None)

    def save(self, path: Path) -> None:
        """As `load` reads it."""
        fuzzy = {_FUZZY: self.fuzzy.words} if self.fuzzy else {}
        np.savez(path, allow_pickle=False, **self.runs, **fuzzy)

    @classmethod
    def load(cls, path: Path, cleaning: CleaningSection) -> "OverlapIndex | None":
        """What was saved for the same `cleaning`; None if nothing was."""
        if not path.exists():
            return None
        with np.load(path) as file:
            runs = dict(file)
        words, section = runs.pop(_FUZZY, None), cleaning.fuzzy_decontamination
        return cls(runs, FuzzyIndex(words, section) if section is not None and words is not None else None)

    def overlap(self, words: Hashes) -> NDArray[np.bool_]:
        """For each of a text's hashed words [words], whether it lies in a run that is also held out."""
        covered = np.zeros(len(words), dtype=np.bool_)
        for length, known in self._known.items():
            for start in np.flatnonzero(known.places(ngram_hashes(words, length))[1]):
                covered[start : start + length] = True
        return covered | self.fuzzy.overlap(words) if self.fuzzy else covered

    def clean(self, text: str) -> str | None:
        """`text` without the lines that hold an overlap; None if that is more than `MAX_OVERLAP` of its words.

        Dropping whole documents, as is usual, would cost a quarter of a library's source for the 0.1 % that overlaps:
        a licence header, an import list. Cutting lines keeps the promise and costs what overlaps. Lines that become
        neighbours may complete a new run, so this repeats until nothing is found.
        """
        original = 0
        while (covered := self.overlap(self._words.of(text))).any():
            original = original or len(covered)
            lines = text.splitlines(keepends=True)
            ends = np.cumsum([len(words_of(line)) for line in lines])
            cut = set(np.searchsorted(ends, np.flatnonzero(covered), side="right").tolist())
            text = "".join(line for i, line in enumerate(lines) if i not in cut)
            if len(words_of(text)) < (1 - MAX_OVERLAP) * original:
                return None
        return text


def decontaminated(overlap: OverlapIndex, shard: int, documents: Documents) -> Arrays:
    """What `rewritten` says of the documents of a shard."""

    def changes() -> Iterator[tuple[int, str | None]]:
        for place, words in enumerate(documents.words()):
            if overlap.overlap(words).any():
                yield place, overlap.clean(documents[place].text)

    return rewritten(documents, changes(), DECONTAMINATED + shard)


class FuzzyIndex:
    """Finds text that shares most of a run of words with a held-out text, though some were changed: the held-out texts
    as one sequence of words, and where each seed stands in it.

    A run of `n` words of which a share `s` is kept has `ceil(s n / (n − s n + 1))` in a row that are: 4 of 20 at 80 %.
    Such seeds are looked up; around each the words are compared, a few places more or less.
    """

    def __init__(self, words: Hashes, section: FuzzySection) -> None:
        """`words`: the texts' hashed words, as `joined` makes them."""
        n = section.ngram
        self.words, self.section = words, section
        self.seed = max(2, math.ceil(section.share * n / (n - section.share * n + 1)))
        seeds = ngram_hashes(words, self.seed)
        inside = np.ones(len(seeds), dtype=np.bool_)
        for i in range(self.seed):
            inside &= words[i : i + len(seeds)] != 0
        places = np.flatnonzero(inside)
        order = np.argsort(seeds[places], kind="stable")
        self._places, self._seeds = places[order], SortedHashes(seeds[places][order])
        ends = np.append(np.flatnonzero(words == 0), len(words))
        after = np.searchsorted(ends, self._places)  # never the first, which opens the first text
        length = np.minimum(ends[after] - ends[after - 1] - 1, n)
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


def too_short(benchmarks: dict[str, list[list[str]]], n: int | None) -> list[LeftOut]:
    """Benchmarks of which a part cannot be looked for."""
    least = min(n or SHORTEST, SHORTEST)
    why = f"records have fewer than {least} words and are not looked for"
    short = {path: [all(len(words_of(text)) < least for text in record) for record in records]
             for path, records in benchmarks.items()}  # fmt: skip
    return [LeftOut(path, f"{sum(few):,} of {len(few):,} {why}") for path, few in short.items() if any(few)]
