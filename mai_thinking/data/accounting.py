"""What a run does not learn from, counted, so that nothing is dropped in silence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mai_thinking.data.documents import Document


class LeftOut(NamedTuple):
    """A line on the console, and a row in the report."""

    where: str
    """A source, or a file."""
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def left_out_table(rows: Sequence[LeftOut]) -> str:
    """The rows as Markdown."""
    cells = (f"| {row.where} | {row.what} |" for row in rows)
    return "\n".join(["| source | left out |", "|---|---|", *cells]) + "\n"


@dataclass
class Tally:
    """What became of a source's documents, as [documents, bytes]; `dropped` by rule, `shortened` with the bytes cut."""

    read: list[int] = field(default_factory=lambda: [0, 0])
    dropped: dict[str, list[int]] = field(default_factory=dict)
    shortened: list[int] = field(default_factory=lambda: [0, 0])
    kept: list[int] = field(default_factory=lambda: [0, 0])

    def drop(self, rule: str, size: int, documents: int = 1) -> None:
        """Count documents, `size` bytes together, under `rule`, which is the name of its config key."""
        before = self.dropped.get(rule, [0, 0])
        self.dropped[rule] = [before[0] + documents, before[1] + size]

    def shorten(self, size: int) -> None:
        """Count a document that `size` bytes are cut out of."""
        self.shortened = [self.shortened[0] + 1, self.shortened[1] + size]

    def sift(self, documents: Iterable[Document], verdicts: Iterable[str | None]) -> list[Document]:
        """The documents on which the verdict is None; the others are counted under the rule that it names."""
        kept = []
        for document, rule in zip(documents, verdicts, strict=True):
            if rule is None:
                kept.append(document)
            else:
                self.drop(rule, document.size)
        return kept

    def left_out(self) -> list[str]:
        """A line for each rule."""
        documents, size = self.read
        lines = [
            f"{rule} dropped {count:,} of {documents:,} documents ({_spell(dropped)} of {_spell(size)})"
            for rule, (count, dropped) in self.dropped.items()
        ]
        if self.shortened[0]:
            count, cut = self.shortened
            lines.append(f"decontamination cut lines out of {count:,} of {documents:,} documents ({_spell(cut)})")
        return lines

    def worst(self) -> str:
        """The rule that dropped most documents, and how many."""
        rule = max(self.dropped, key=lambda rule: self.dropped[rule][0], default=None)
        return f"none of its {self.read[0]} documents is left" + (
            f"; `{rule}` dropped {self.dropped[rule][0]} of them" if rule else ""
        )


def count(documents: Sequence[Document]) -> list[int]:
    """[documents, bytes]"""
    return [len(documents), sum(document.size for document in documents)]


def _spell(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:,.0f} kB" if size < 10_000_000 else f"{size / 1e6:,.1f} MB"
