"""What became of documents, counted, so that nothing is dropped in silence; and the data card that tells it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

from mai_thinking.config.table import Table
from mai_thinking.data.documents import Documents

CARD = "card.md"
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
        if like is not None:
            for source in dict.fromkeys(like.records["source"].tolist()):
                theirs = documents[like.records["source"] == source]
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
        of = f"of {documents:,} documents"
        dropped = [
            f"{rule} dropped {count:,} {of} ({_spell(gone)} of {_spell(size)})"
            for rule, (count, gone) in self.dropped.items()
        ]
        return dropped + [
            f"{rule} cut lines out of {count:,} {of} ({_spell(gone)})" for rule, (count, gone) in self.cut.items()
        ]

    def worst(self) -> str:
        """The rule that dropped most documents, and how many."""
        told = f"none of its {self.read[0]} documents is left"
        if not self.dropped:
            return told
        rule, (count, _) = max(self.dropped.items(), key=lambda found: found[1][0])
        return f"{told}; `{rule}` dropped {count} of them"


def _add(counts: dict[str, list[int]], name: str, size: int, documents: int) -> None:
    before = counts.get(name, [0, 0])
    counts[name] = [before[0] + documents, before[1] + size]


def _spell(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:,.0f} kB" if size < 10_000_000 else f"{size / 1e6:,.1f} MB"


# ---------------------------------------------------------------------------------------------------------------- card


def card(manifest: Mapping[str, Any]) -> str:
    """The data card of a prepared corpus, as Markdown: what it is made of, what was left out and why, what it is kept
    apart from. Made from the manifest alone, without timings: the same whenever the same corpus is prepared. The
    manifest has its hash, and a run's lineage that of the manifest."""
    sources = manifest["sources"]
    tallies = {name: Tally(**source["counts"]) for name, source in sources.items()}
    rows = []
    for name, source in sources.items():
        where = "embedded" if source["kind"] == "embedded" else f"{source['kind']}: {PurePath(source['path']).name}"
        tokens = "streamed" if source["tokens"] is None else f"{source['tokens']:,}"
        counts = map(_documents, (tallies[name].read, tallies[name].kept, source["held_out"]))
        rows.append([name, where, source["category"], source["licence"], source["provenance"], *counts, tokens])
    left_out, overlaps, labels, examples = list[list[str]](), list[list[str]](), list[list[str]](), list[list[str]]()
    for name, tally in tallies.items():
        for rule, pair in tally.stages().items():
            left_out.append([name, rule, _documents(pair), f"{100 * pair[1] / max(1, tally.read[1]):.2f} %"])
        for other, pair in tally.overlaps.items():
            overlaps.append([name, "itself" if other == name else other, _documents(pair)])
        labels += [[name, label, _documents(pair)] for label, pair in tally.labels.items()]
        for rule, shown in tally.examples.items():
            examples += [[name, rule, _quoted(id), _quoted(begin), *(like or [""])] for id, begin, *like in shown]
    names = ["source", "from", "category", "licence", "provenance", "read", "trained on", "held out", "tokens"]
    benchmarks = [[name, f"{records:,}"] for name, records in manifest["benchmarks"].items()]
    counted, columns = "documents and bytes", ["source", "stage", "document", "how it begins", "the like"]
    parts = {
        "# Data card": Table(names, rows),
        "## Left out, by stage": Table(["source", "stage", counted, "share of bytes"], left_out),
        "## Overlaps": Table(["of source", "dropped, since the like is in", counted], overlaps),
        "## Labels": Table(["source", "label", counted], labels),
        "## Kept apart from\n\nIts held-out documents, and:": Table(["benchmark", "records"], benchmarks),
        "## Examples of what was dropped": Table(columns, examples),
    }
    if not labels:
        del parts["## Labels"]
    return "\n\n".join(f"{heading}\n\n{table.markdown()}" for heading, table in parts.items()) + "\n"


def _documents(pair: Sequence[int]) -> str:
    return f"{pair[0]:,} ({pair[1] / 1e6:,.2f} MB)"


def _quoted(text: str) -> str:
    """As one line of code in a cell of a table."""
    return "`" + text.encode("unicode_escape").decode().replace("`", "'").replace("|", "¦") + "`"
