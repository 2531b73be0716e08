"""Lines that say nothing of the document that they stand in, found by their counts. MAI-Thinking-1 report §2.4.3."""

from collections.abc import Iterator, Set
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from mai_thinking.config.data import BoilerplateSection
from mai_thinking.data.documents import BOILERPLATE, Documents, rewritten
from mai_thinking.data.words import RunCounts, words_of
from mai_thinking.data.work import Arrays, Parts, Work

_COMMENT = ("#", "//", "*", "/*", "--", ";", "%", "<!--")


def without_boilerplate(documents: Documents, code: Set[int], section: BoilerplateSection, work: Work) -> Parts:
    """The documents without the lines that stand in more than `across` of them, and without the repetitions of one that
    stands in a document more than `within` times; as `rewritten` tells it. `code`: the sources of which comments alone
    may be cut, since a program without a statement is none."""

    def count(path: Path) -> None:
        counts = RunCounts.expecting(documents.size // 4)
        for hashes, ends in zip(lines.each("hashes"), lines.each("ends"), strict=True):
            owners = np.repeat(np.arange(len(ends), dtype=np.uint64), np.diff(ends, prepend=0))
            slots, known = counts.slots(hashes), hashes != 0
            bits = np.uint64(len(counts.table).bit_length())
            once = np.unique((owners[known] << bits) | slots[known]) & np.uint64(len(counts.table) - 1)
            counts.add(*np.unique(once, return_counts=True))
        with path.open("wb") as file:
            np.save(file, counts.table)

    lines = work.each("lines", partial(_lines, section.min_words, code), documents)
    table = work.once("line_counts.npy", count)
    return work.each("boilerplate", partial(_cut, table, lines, section), documents)


def _lines(min_words: int, code: Set[int], shard: int, documents: Documents) -> Arrays:
    """A hash of each line [lines], but for the white space around it; 0 for one that is never cut. Where [documents]
    those of a document end."""
    hashes, ends = list[int](), list[int]()
    for text, source in zip(documents.texts(), documents.records["source"], strict=True):
        for bare in map(str.strip, text.splitlines()):
            long = len(bare) >= min_words and (source not in code or bare.startswith(_COMMENT))
            hashes.append(xxhash.xxh3_64_intdigest(bare.encode()) if long else 0)
        ends.append(len(hashes))
    return {"hashes": np.array(hashes, dtype=np.uint64), "ends": np.array(ends, dtype=np.int64)}


def _cut(table: Path, lines: Parts, section: BoilerplateSection, shard: int, documents: Documents) -> Arrays:
    counts, found = RunCounts(np.load(table, mmap_mode="r")), lines.of(shard)
    everywhere = (counts.of(found["hashes"]) > section.across) & (found["hashes"] != 0)

    def changed() -> Iterator[tuple[int, str | None]]:
        for place, (begin, end) in enumerate(pairwise([0, *found["ends"].tolist()])):
            hashes, cut = found["hashes"][begin:end], everywhere[begin:end].copy()
            _, first, same = np.unique(hashes, return_index=True, return_inverse=True)
            often = (np.bincount(same)[same] > section.within) & (hashes != 0) if len(hashes) else cut
            cut |= often & (first[same] != np.arange(len(hashes)))
            if not cut.any():
                continue
            text = documents[place].text.splitlines(keepends=True)
            marked = zip(text, cut.tolist(), strict=True)
            kept = [line for line, gone in marked if not gone or len(words_of(line)) < section.min_words]
            if len(kept) < len(text):
                left = "".join(kept)
                yield place, left if left.strip() else None

    return rewritten(documents, changed(), BOILERPLATE + shard)
