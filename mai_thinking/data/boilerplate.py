"""Lines that say nothing of the document that they stand in, found by their counts. MAI-Thinking-1 report §2.4.3."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from mai_thinking.config.data import BoilerplateSection
from mai_thinking.data.documents import Document
from mai_thinking.data.words import Hashes, RunCounts, words_of

_COMMENT = ("#", "//", "*", "/*", "--", ";", "%", "<!--")


def without_boilerplate(
    documents: Sequence[Document], in_code: Sequence[bool], section: BoilerplateSection
) -> Iterator[str | None]:
    """Each document's text, or None where it stays as it is, without the lines that stand in more than
    `across` documents, and without the repetitions of one that stands in it more than `within` times. `in_code`:
    whether comments alone may be cut, since a program without a statement is none."""
    everywhere = RunCounts(sum(document.size for document in documents) // 4)
    for document, code in zip(documents, in_code, strict=True):
        everywhere.add(_cuttable(document.text.splitlines(), code, section))
    for document, code in zip(documents, in_code, strict=True):
        lines = document.text.splitlines(keepends=True)
        hashes = _hashes(lines, code, section)
        counts = Counter(hashes)
        often = {line for line in counts if line is not None and counts[line] > section.within}
        known = _cuttable(lines, code, section)
        cut = set(known[everywhere.of(known) > section.across].tolist())
        if not often and not cut:
            yield None
            continue
        seen: set[int | None] = set()
        kept = []
        for line, hashed in zip(lines, hashes, strict=True):
            if hashed not in cut and not (hashed in often and hashed in seen):
                kept.append(line)
            seen.add(hashed)
        yield "".join(kept)


def _cuttable(lines: Sequence[str], code: bool, section: BoilerplateSection) -> Hashes:
    """The hashes, each once."""
    found = set(_hashes(lines, code, section)) - {None}
    return np.fromiter(found, dtype=np.uint64, count=len(found))


def _hashes(lines: Sequence[str], code: bool, section: BoilerplateSection) -> list[int | None]:
    """Of each line, but for the white space around it; None for one that is never cut."""
    return [
        xxhash.xxh3_64_intdigest(bare.encode())
        if len(bare) >= section.min_words  # which is quickly seen of most
        and (not code or bare.startswith(_COMMENT))
        and len(words_of(bare)) >= section.min_words
        else None
        for bare in map(str.strip, lines)
    ]
