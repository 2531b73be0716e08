"""Lines that say nothing of the document that they stand in, found by their counts. MAI-Thinking-1 report §2.4.3."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import xxhash

from mai_thinking.config.data import BoilerplateSection
from mai_thinking.data.documents import Document
from mai_thinking.data.words import Hashes, words_of

_COMMENT = ("#", "//", "*", "/*", "--", ";", "%", "<!--")


def without_boilerplate(
    documents: Sequence[Document], in_code: Sequence[bool], section: BoilerplateSection
) -> list[str]:
    """Each document's text without the lines that stand in more than `across` documents, and without the repetitions
    of one that stands in it more than `within` times. `in_code`: whether comments alone may be cut, since a program
    without a statement is none."""
    everywhere = _everywhere(documents, in_code, section)
    texts = []
    for document, code in zip(documents, in_code, strict=True):
        lines = document.text.splitlines(keepends=True)
        hashes = _hashes(lines, code, section)
        often = {line for line, count in Counter(hashes).items() if line is not None and count > section.within}
        if not often and everywhere.isdisjoint(hashes):
            texts.append(document.text)
            continue
        seen: set[int | None] = set()
        kept = []
        for line, hashed in zip(lines, hashes, strict=True):
            if hashed not in everywhere and not (hashed in often and hashed in seen):
                kept.append(line)
            seen.add(hashed)
        texts.append("".join(kept))
    return texts


def _everywhere(documents: Sequence[Document], in_code: Sequence[bool], section: BoilerplateSection) -> set[int | None]:
    """The lines that stand in too many documents. 8 bytes of memory a line."""
    parts: list[Hashes] = [np.zeros(0, dtype=np.uint64)]
    for document, code in zip(documents, in_code, strict=True):
        found = set(_hashes(document.text.splitlines(), code, section)) - {None}
        parts.append(np.fromiter(found, dtype=np.uint64, count=len(found)))
    lines, counts = np.unique(np.concatenate(parts), return_counts=True)
    return set(lines[counts > section.across].tolist())


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
