"""What a benchmark found, as a table for people and as JSON for programs."""

import json
from dataclasses import asdict, dataclass, field
from itertools import groupby

from mai_thinking.bench.timing import Figure

Case = dict[str, str | int | float]


@dataclass(frozen=True)
class Row:
    """One case and what was measured in it."""

    case: Case
    figures: dict[str, Figure]

    @property
    def columns(self) -> tuple[str, ...]:
        """Headings: the case's keys, then the figures with their units."""
        return (*self.case, *(f"{name} {figure.unit}" for name, figure in self.figures.items()))

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands below them."""
        return (*map(str, self.case.values()), *(figure.text() for figure in self.figures.values()))


@dataclass
class Result:
    """Everything that a benchmark has to say."""

    bench: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    """What a reader must know to read the rows right."""
    ceiling: dict[str, Figure] = field(default_factory=dict)
    machine: dict[str, str | int] = field(default_factory=dict)

    def text(self) -> str:
        """Tables, one for each run of rows with the same columns; medians, with quartiles in brackets."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        limits = [f"{name} {figure.text()} {figure.unit}" for name, figure in self.ceiling.items()]
        tables = [_table(list(rows)) for _, rows in groupby(self.rows, lambda row: row.columns)]
        return "\n\n".join((machine, "ceiling: " + ", ".join(limits), *tables, "\n".join(self.notes)))

    def json(self) -> str:
        """One line, with every figure: median, quartiles, count and unit."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


def _table(rows: list[Row]) -> str:
    lines = [rows[0].columns, *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
