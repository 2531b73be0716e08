"""Held-out text as several sets a category: by package, by kind of document, by kind of exercise.

MAI-Thinking-1 report §2.3, Eq. 3 averages a category's benchmarks uniformly; one large package would otherwise be most
of its category.
"""

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
        by_source: dict[str, dict[str, list[Document]]] = {}
        for document in documents:
            source, _, id = document.id.partition("/")
            part = exercise_kind(int(id)) if source in exercises else _folder(id)
            by_source.setdefault(source, {}).setdefault(part, []).append(document)
        found[category] = {
            f"{source}/{part}": chosen for source, parts in by_source.items() for part, chosen in _merged(parts).items()
        }
    return found


def _folder(id: str) -> str:
    folder, separator, _ = id.partition("/")
    return folder if separator else "modules"


def _merged(parts: dict[str, list[Document]]) -> dict[str, list[Document]]:
    sizes = {name: sum(document.size for document in documents) for name, documents in parts.items()}
    least = _SMALL * sum(sizes.values())
    small = [name for name in parts if sizes[name] < least]
    kept = {name: documents for name, documents in sorted(parts.items()) if name not in small}
    rest = [document for name in small for document in parts[name]]
    return kept | ({REST: rest} if rest else {})


def fingerprint(documents: Sequence[Document]) -> str:
    """16 hex digits of a set's text."""
    texts = sorted(document.text for document in documents)
    return xxhash.xxh3_64_hexdigest("\0".join(texts).encode())
