"""Which source gives the next row, and the report's table of the mixture (MAI-Thinking-1 report §2.4)."""

from collections.abc import Mapping, Sequence
from typing import Any

from mai_thinking.config.table import Cell, Table


class Mixture:
    """Rows are dealt to the source that lags furthest behind its share: no dice, and never more than a row off."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        self.shares = {name: weight / total for name, weight in weights.items()}
        self.rows = dict.fromkeys(weights, 0)

    def next_source(self) -> tuple[str, int]:
        """The source of the next row, and how many rows it had given before."""
        dealt = sum(self.rows.values()) + 1
        name = max(self.rows, key=lambda source: self.shares[source] * dealt - self.rows[source])
        index = self.rows[name]
        self.rows[name] += 1
        return name, index


def mixture_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `PreparedData.mixture` as Markdown."""
    columns = ["source", "category", "licence", "provenance", "unique tokens", "training tokens", "share", "epochs"]
    cells: list[list[Cell]] = []
    for row in rows:
        unique = "streamed" if row["unique_tokens"] is None else row["unique_tokens"]
        epochs = "–" if row["epochs"] is None else row["epochs"]
        names = [row[name] for name in ("source", "category", "licence", "provenance")]
        cells.append([*names, unique, row["training_tokens"], f"{100 * row['share']:.1f} %", epochs])
    return Table(columns, cells, digits=2).markdown() + "\n"
