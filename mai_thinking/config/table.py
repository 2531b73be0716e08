"""Tables for every floor: Markdown for people, and the same numbers as JSON for programs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Interval(NamedTuple):
    """A value with the ends of its interval, or the least and the most of several."""

    value: float
    low: float
    high: float


Cell = str | int | float | Interval | None


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    digits: int = 3

    def markdown(self) -> str:
        """Columns of numbers are aligned to the right. "None." where there is no row."""
        if not self.rows:
            return "None."
        numeric = [any(not isinstance(row[i], str | None) for row in self.rows) for i in range(len(self.columns))]
        lines = [self.columns, ["---:" if right else "---" for right in numeric]]
        lines += [[self._spell(cell) for cell in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def records(self) -> list[dict[str, Any]]:
        """The same as JSON, an object a row."""
        cells = [[c._asdict() if isinstance(c, Interval) else c for c in row] for row in self.rows]
        return [dict(zip(self.columns, row, strict=True)) for row in cells]

    def _spell(self, cell: Cell) -> str:
        match cell:
            case None:
                return ""
            case Interval(value, low, high):
                return f"{value:.{self.digits}f} ({low:.{self.digits}f}–{high:.{self.digits}f})"
            case str():
                return cell.replace("|", "\\|").replace("\n", " ")
            case int():
                return f"{cell:,}"
        return "–" if math.isnan(cell) else f"{cell:.{self.digits}f}"
