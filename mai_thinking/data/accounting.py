"""What a run does not learn from, counted, so that nothing is dropped in silence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mai_thinking.config.table import Table
from mai_thinking.data.documents import Document

_EXAMPLES = 3
"""Documents of a rule that are shown."""
_BEGINNING = 160
"""Characters of each."""


class LeftOut(NamedTuple):
    """A line on the console, and a row in the report."""

    where: str
    """A source, or a file."""
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def left_out_table(rows: Sequence[LeftOut]) -> str:
    """The rows as Markdown."""
    return Table(["source", "left out"], rows).markdown() + "\n"


@dataclass
class Tally:
    """What became of a source's documents, as [documents, bytes]; rules are named after their config keys."""

    read: list[int] = field(default_factory=lambda: [0, 0])
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """By rule."""
    cut: dict[str, list[int]] = field(default_factory=dict)
    """By rule, the documents that were shortened and the bytes that were cut out of them."""
    kept: list[int] = field(default_factory=lambda: [0, 0])
    labels: dict[str, list[int]] = field(default_factory=dict)
    """Of all that were read, by `CLASSIFIER: LABEL`."""
    overlaps: dict[str, list[int]] = field(default_factory=dict)
    """Source → documents dropped because that one, or this one itself, has the like."""
    examples: dict[str, list[list[str]]] = field(default_factory=dict)
    """Rule → the first documents that it dropped: the name, how the text begins, and of a copy whose it is."""

    def drop(self, rule: str, size: int, documents: int = 1) -> None:
        """Count documents, `size` bytes together, under `rule`."""
        _add(self.dropped, rule, size, documents)

    def drop_document(self, rule: str, document: Document, like: tuple[str, Document] | None = None) -> None:
        """Count one document, and keep its beginning if it is among the first. `like`: the source and the document that
        it repeats."""
        self.drop(rule, document.size)
        shown = self.examples.setdefault(rule, [])
        if len(shown) < _EXAMPLES:
            copied = [f"{like[0]}/{like[1].id}"] if like else []
            shown.append([document.id, document.text[:_BEGINNING], *copied])
        if like:
            _add(self.overlaps, like[0], document.size)

    def shorten(self, rule: str, size: int) -> None:
        """Count a document that `size` bytes are cut out of."""
        _add(self.cut, rule, size)

    def label(self, label: str, size: int) -> None:
        """Count a document, `size` bytes, under a label."""
        _add(self.labels, label, size)

    def sift(self, documents: Iterable[Document], verdicts: Iterable[str | None]) -> list[Document]:
        """The documents on which the verdict is None; the others are counted under the rule that it names."""
        kept = []
        for document, rule in zip(documents, verdicts, strict=True):
            if rule is None:
                kept.append(document)
            else:
                self.drop_document(rule, document)
        return kept

    def stages(self) -> dict[str, list[int]]:
        """Stage → documents and bytes that it dropped, or cut out."""
        return self.dropped | {f"{rule} (cut)": pair for rule, pair in self.cut.items()}

    def left_out(self) -> list[str]:
        """A line for each rule."""
        documents, size = self.read
        return [
            f"{rule} dropped {count:,} of {documents:,} documents ({_spell(dropped)} of {_spell(size)})"
            for rule, (count, dropped) in self.dropped.items()
        ] + [
            f"{rule} cut lines out of {count:,} of {documents:,} documents ({_spell(cut)})"
            for rule, (count, cut) in self.cut.items()
        ]

    def worst(self) -> str:
        """The rule that dropped most documents, and how many."""
        rule = max(self.dropped, key=lambda rule: self.dropped[rule][0], default=None)
        return f"none of its {self.read[0]} documents is left" + (
            f"; `{rule}` dropped {self.dropped[rule][0]} of them" if rule else ""
        )


def count(documents: Sequence[Document]) -> list[int]:
    """[documents, bytes]"""
    return [len(documents), sum(document.size for document in documents)]


def _add(counts: dict[str, list[int]], name: str, size: int, documents: int = 1) -> None:
    before = counts.get(name, [0, 0])
    counts[name] = [before[0] + documents, before[1] + size]


def _spell(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:,.0f} kB" if size < 10_000_000 else f"{size / 1e6:,.1f} MB"
