"""The removal of held-out text from training text. MAI-Thinking-1 report §2.4.4.

The promise: no run of `n` words of a held-out document or benchmark is trained on, nor the whole of a shorter text that
has `SHORTEST` words. Case, accents, punctuation, line ends and invisible characters do not matter. A character of a
script that is written without spaces counts as a word.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mai_thinking.config.data import CleaningSection
from mai_thinking.data.documents import DECONTAMINATED, Documents, rewritten
from mai_thinking.data.fuzzy import FuzzyIndex
from mai_thinking.data.jsonl import read_json, read_jsonl, read_text
from mai_thinking.data.words import Hashes, SortedHashes, WordHashes, ngram_hashes, words_of
from mai_thinking.data.work import Arrays

SHORTEST = 8
"""Words of the shortest text that is looked for, as GPT-3's paper has it: fewer stand in innocent text by chance."""
_FUZZY = "fuzzy"
MAX_OVERLAP = 0.5
"""A document that loses more than this share of its words to decontamination is dropped whole."""


class OverlapIndex:
    """What must not be trained on, and what to do with text that contains it."""

    def __init__(self, runs: Mapping[str, Hashes], fuzzy: FuzzyIndex | None = None) -> None:
        """`runs`: by number of words (as text), the sorted hashes of the runs of this length."""
        self.runs, self.fuzzy = runs, fuzzy
        self._known = {int(length): SortedHashes(hashes) for length, hashes in runs.items()}
        self._words = WordHashes()

    @classmethod
    def of(cls, cleaning: CleaningSection, texts: Iterable[str]) -> "OverlapIndex | None":
        """What `cleaning` looks for of `texts`; None if that is nothing."""
        n, section, words = cleaning.decontamination_ngram, cleaning.fuzzy_decontamination, WordHashes()
        if n is None and section is None:
            return None
        texts = list(texts)
        index = cls({}) if n is None else cls.build(n, texts)
        if section is not None:
            hashed = [found for text in texts if len(found := words.of(text)) >= SHORTEST]
            index.fuzzy = FuzzyIndex(FuzzyIndex.joined(hashed), section)
        return index

    def save(self, path: Path) -> None:
        """As `load` reads it."""
        fuzzy = {_FUZZY: self.fuzzy.words} if self.fuzzy else {}
        np.savez(path, allow_pickle=False, **self.runs, **fuzzy)

    @classmethod
    def load(cls, path: Path, cleaning: CleaningSection) -> "OverlapIndex | None":
        """What was saved for the same `cleaning`; None if it looks for nothing."""
        if cleaning.decontamination_ngram is None and cleaning.fuzzy_decontamination is None:
            return None
        with np.load(path) as file:
            runs = dict(file)
        words, section = runs.pop(_FUZZY, None), cleaning.fuzzy_decontamination
        return cls(runs, FuzzyIndex(words, section) if section is not None and words is not None else None)

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

    def overlap(self, words: Hashes) -> NDArray[np.bool_]:
        """For each of a text's hashed words [words], whether it lies in a run that is also held out."""
        covered = np.zeros(len(words), dtype=np.bool_)
        for length, known in self._known.items():
            for start in np.flatnonzero(known.contains(ngram_hashes(words, length))):
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
