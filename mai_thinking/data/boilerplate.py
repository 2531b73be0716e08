"""Lines that say nothing of the document that they stand in, found by their counts. MAI-Thinking-1 report §2.4.3."""

from collections.abc import Iterator, Set
from functools import partial
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
    counts = RunCounts.expecting(documents.size // 4)
    lines = work.each("lines", partial(_lines, section.min_words, code, len(counts.table)), documents)
    table = work.once("line_counts.npy", partial(counts.save_sum, lines))
    return work.each("boilerplate", partial(_cut, table, lines, section), documents)


def _lines(min_words: int, code: Set[int], size: int, shard: int, documents: Documents) -> Arrays:
    """A hash of each line [lines], but for the white space around it; 0 for one that is never cut. Where [documents]
    those of a document end. The counts of a table of `size`."""
    found = []
    for text, source in zip(documents.texts(), documents.records["source"], strict=True):
        lines = [line.strip() for line in text.splitlines()]
        long = [len(line) >= min_words and (source not in code or line.startswith(_COMMENT)) for line in lines]
        marked = zip(lines, long, strict=True)
        hashes = [xxhash.xxh3_64_intdigest(line.encode()) if may_go else 0 for line, may_go in marked]
        found.append(np.array(hashes, dtype=np.uint64))
    counts = RunCounts.empty(size).in_documents(hashes[hashes != 0] for hashes in found)
    return {"hashes": np.concatenate(found), "ends": np.cumsum([*map(len, found)], dtype=np.int64), **counts}


def _cut(table: Path, lines: Parts, section: BoilerplateSection, shard: int, documents: Documents) -> Arrays:
    counts, found = RunCounts(np.load(table, mmap_mode="r")), lines.of(shard)

    def changed() -> Iterator[tuple[int, str | None]]:
        for place, hashes in enumerate(np.split(found["hashes"], found["ends"][:-1])):
            _, first, same, times = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
            repeated = (times[same] > section.within) & (first[same] != np.arange(len(hashes)))
            cut = ((counts.of(hashes) > section.across) | repeated) & (hashes != 0)
            if not cut.any():
                continue
            text = documents[place].text.splitlines(keepends=True)
            marked = zip(text, cut.tolist(), strict=True)
            kept = [line for line, gone in marked if not gone or len(words_of(line)) < section.min_words]
            if len(kept) < len(text):
                left = "".join(kept)
                yield place, left if left.strip() else None

    return rewritten(documents, changed(), BOILERPLATE + shard)
