"""What a run does not learn from, counted, so that nothing is dropped in silence."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mai_thinking.config.table import Table
from mai_thinking.data.documents import Documents

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

    def drop_documents(
        self, rule: str, documents: Documents, like: Documents | None = None, names: Sequence[str] = ()
    ) -> None:
        """Count documents, and keep the beginnings of the first. `like`: the one that each repeats, of sources that
        have these `names`."""
        if not len(documents):
            return
        self.drop(rule, documents.size, len(documents))
        shown = self.examples.setdefault(rule, [])
        for place in range(min(_EXAMPLES - len(shown), len(documents))):
            copied = [f"{names[like.records['source'][place]]}/{like[place].id}"] if like is not None else []
            shown.append([documents[place].id, documents[place].text[:_BEGINNING], *copied])
        for source in dict.fromkeys(like.records["source"].tolist()) if like is not None else ():
            theirs = documents[like.records["source"] == source] if like is not None else documents
            _add(self.overlaps, names[source], theirs.size, len(theirs))

    def shorten(self, rule: str, size: int, documents: int) -> None:
        """Count documents that `size` bytes together are cut out of."""
        if documents:
            _add(self.cut, rule, size, documents)

    def label(self, label: str, documents: Documents) -> None:
        """Count documents under a label."""
        _add(self.labels, label, documents.size, len(documents))

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


def _add(counts: dict[str, list[int]], name: str, size: int, documents: int = 1) -> None:
    before = counts.get(name, [0, 0])
    counts[name] = [before[0] + documents, before[1] + size]


def _spell(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:,.0f} kB" if size < 10_000_000 else f"{size / 1e6:,.1f} MB"
