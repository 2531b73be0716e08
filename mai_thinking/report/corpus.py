"""The page of a prepared corpus: documents and bytes by source and stage, speed, lengths, examples."""

import numpy as np

from mai_thinking.config.table import Cell, Table
from mai_thinking.data import PreparedData
from mai_thinking.data.accounting import CARD, Tally
from mai_thinking.report.document import Document
from mai_thinking.report.figures import Figure, Panel, Series

_MEGA = 1e6


def corpus_page(data: PreparedData) -> Document:
    """What became of the documents, from the manifest and the tokens."""
    page = Document("Corpus")
    manifest = data.manifest
    tallies = {name: Tally(**source["counts"]) for name, source in manifest["sources"].items()}
    page.facts |= {"key": data.key, "content": data.content}
    page.add_table("stages", _stages(tallies), "Documents and bytes")
    page.add_table("seconds", _seconds(manifest["seconds"], sum(tally.read[1] for tally in tallies.values())), "Time")
    page.add_figures([_lengths(data)])
    page.add((data.folder / CARD).read_text(encoding="utf-8"))
    return page


def estimate(data: PreparedData, sample: float) -> str:
    """Time and disk of the whole, from a `sample` of it."""
    seconds = sum(value for name, value in data.manifest["seconds"].items() if ":" not in name) / sample
    size = sum(file["bytes"] for file in data.manifest["files"].values()) / sample
    return (
        f"the whole: about {seconds / 60:,.1f} minutes and {size / 1e9:,.2f} GB on disk; near copies are "
        "mostly not in one sample, so their share will be larger"
    )


def _stages(tallies: dict[str, Tally]) -> Table:
    rows: list[list[Cell]] = []
    for name, tally in tallies.items():
        rows.append([name, "read", tally.read[0], tally.read[1] / _MEGA, None])
        for rule, (documents, size) in tally.stages().items():
            rows.append([name, rule, documents, size / _MEGA, 100 * size / max(1, tally.read[1])])
        rows.append([name, "trained on", *_kept(tally)])
    return Table(["source", "stage", "documents", "MB", "% of bytes"], rows, digits=2)


def _kept(tally: Tally) -> list[Cell]:
    return [tally.kept[0], tally.kept[1] / _MEGA, 100 * tally.kept[1] / max(1, tally.read[1])]


def _seconds(seconds: dict[str, float], size: int) -> Table:
    rows: list[list[Cell]] = [[name, s, size / _MEGA / s if s else None] for name, s in seconds.items()]
    return Table(["phase", "seconds", "MB/s of all that was read"], rows, digits=2)


def _lengths(data: PreparedData) -> Figure:
    series = []
    edges = np.logspace(1, 6, 41)
    for name, source in data.sources.items():
        sizes = np.diff(source.offsets)
        tokens, _ = np.histogram(sizes, bins=edges, weights=sizes)
        series.append(Series(name, edges[:-1].tolist(), (tokens / max(1, sizes.sum())).tolist()))
    panel = Panel("Share of a source's tokens, by the length of their documents", series, x_name="tokens", log_x=True)
    return Figure("lengths", [panel], columns=1, size=(9.0, 4.0))
