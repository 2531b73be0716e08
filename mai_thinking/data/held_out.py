"""Held-out text as several sets a category: by package, by kind of document, by kind of exercise.

MAI-Thinking-1 report §2.3, Eq. 3 averages a category's benchmarks uniformly; one large package would otherwise be most
of its category.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import xxhash

from mai_thinking.config.data import SourceSection
from mai_thinking.data.documents import Document
from mai_thinking.data.exercises import exercise_kind

REST = "others"
_SMALL = 0.05
"""A set with less than this share of its source's held-out bytes goes to the rest."""


def held_out_sets(
    held_out: Mapping[str, Sequence[Document]], sources: Sequence[SourceSection]
) -> dict[str, dict[str, list[Document]]]:
    """Category → set → documents. A set is a source's top folder (`scientific/numpy`, `manuals/topics`), its single
    files (`stdlib/modules`), or a kind of exercise; the small ones of a source are one (`stdlib/others`)."""
    exercises = {source.name for source in sources if source.kind == "embedded" and source.path == "exercises"}
    found: dict[str, dict[str, list[Document]]] = {}
    for category, documents in held_out.items():
        by_source: defaultdict[str, defaultdict[str, list[Document]]] = defaultdict(lambda: defaultdict(list))
        for document in documents:
            source, _, id = document.id.partition("/")
            folder = id.partition("/")[0] if "/" in id else "modules"
            by_source[source][exercise_kind(int(id)) if source in exercises else folder].append(document)
        found[category] = {}
        for source, parts in by_source.items():
            sizes = {name: sum(document.size for document in part) for name, part in parts.items()}
            small = [name for name in parts if sizes[name] < _SMALL * sum(sizes.values())]
            found[category] |= {f"{source}/{name}": parts[name] for name in sorted(parts) if name not in small}
            if small:
                found[category][f"{source}/{REST}"] = [document for name in small for document in parts[name]]
    return found


def fingerprint(documents: Sequence[Document]) -> str:
    """16 hex digits of a set's text."""
    texts = sorted(document.text for document in documents)
    return xxhash.xxh3_64_hexdigest("\0".join(texts).encode())
