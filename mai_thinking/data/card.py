"""The data card of a prepared corpus: what it is made of, what was left out and why, what it is kept apart from.

Made from the manifest alone, and beside it; the manifest has its hash, and a run's lineage that of the manifest.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mai_thinking.config.table import Table
from mai_thinking.data.accounting import Tally

CARD = "card.md"


def card(manifest: Mapping[str, Any]) -> str:
    """`manifest` as Markdown, without timings: the same whenever the same corpus is prepared."""
    sources = manifest["sources"]
    tallies = {name: Tally(**source["counts"]) for name, source in sources.items()}
    rows = []
    for name, source in sources.items():
        tally, held = tallies[name], source["held_out"]
        where = "embedded" if source["kind"] == "embedded" else f"{source['kind']}: {PurePath(source['path']).name}"
        tokens = "streamed" if source["tokens"] is None else f"{source['tokens']:,}"
        counts = [_documents(pair) for pair in (tally.read, tally.kept, held)]
        rows.append([name, where, source["category"], source["licence"], source["provenance"], *counts, tokens])
    names = ["source", "from", "category", "licence", "provenance", "read", "trained on", "held out", "tokens"]
    parts: list[str | Table] = ["# Data card", Table(names, rows), "## Left out, by stage"]
    parts.append(Table(["source", "stage", "documents and bytes", "share of bytes"], stage_rows(tallies)))
    overlaps = [
        [name, "itself" if other == name else other, _documents(pair)]
        for name, tally in tallies.items()
        for other, pair in tally.overlaps.items()
    ]
    parts += [
        "## Overlaps",
        Table(["of source", "dropped, since the like is in", "documents and bytes"], overlaps),
    ]
    labels = [
        [name, label, _documents(pair)] for name, tally in tallies.items() for label, pair in tally.labels.items()
    ]
    parts += ["## Labels", Table(["source", "label", "documents and bytes"], labels)] if labels else []
    benchmarks = [[name, f"{records:,}"] for name, records in manifest.get("benchmarks", {}).items()]
    parts += [
        "## Kept apart from",
        "Its held-out documents, and:",
        Table(["benchmark", "records"], benchmarks),
    ]
    examples = [
        [name, rule, *map(_quoted, one[:2]), one[2] if len(one) > 2 else ""]
        for name, tally in tallies.items()
        for rule, shown in tally.examples.items()
        for one in shown
    ]
    columns = ["source", "stage", "document", "how it begins", "the like"]
    parts += ["## Examples of what was dropped", Table(columns, examples)]
    return "\n\n".join(part if isinstance(part, str) else part.markdown() for part in parts) + "\n"


def stage_rows(tallies: Mapping[str, Tally]) -> list[list[str]]:
    """[source, stage, documents and bytes dropped or cut, share of the source's bytes] of each stage that did any."""
    rows = []
    for name, tally in tallies.items():
        for rule, pair in tally.stages().items():
            rows.append([name, rule, _documents(pair), f"{100 * pair[1] / max(1, tally.read[1]):.2f} %"])
    return rows


def _documents(pair: Sequence[int]) -> str:
    return f"{pair[0]:,} ({pair[1] / 1e6:,.2f} MB)"


def _quoted(text: str) -> str:
    """As one line of code in a cell of a table."""
    return "`" + text.encode("unicode_escape").decode().replace("`", "'").replace("|", "¦") + "`"
