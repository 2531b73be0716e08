"""Timing sides against each other: in turn, many times, with medians, quartiles and ratios round by round.

A machine's clock rate, caches and neighbours change over minutes, and so do means. What one round's sides have in
common drops out of their ratio; what struck a single turn drops out of a median.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

Side = Callable[[], float | None]
"""Does its work once, and may say how much of it there was."""


class Turn(NamedTuple):
    """One side's part in one round."""

    seconds: float
    amount: float
    """What the side returned; 1 if it returned nothing."""


@dataclass(frozen=True)
class Figure:
    """Something that was measured `count` times: the median and the quartiles."""

    median: float
    low: float
    high: float
    count: int
    unit: str

    @classmethod
    def of(cls, values: Iterable[float], unit: str) -> "Figure":
        """The figure of at least one value."""
        known = list(values)
        low, _, high = quantiles(known, n=4, method="inclusive") if len(known) > 1 else (known[0],) * 3
        return cls(median(known), low, high, len(known), unit)

    def text(self) -> str:
        """`12.3 (12.1 … 13)`; a single value stands alone."""
        return f"{self.median:.3g}" if self.count == 1 else f"{self.median:.3g} ({self.low:.3g} … {self.high:.3g})"


@dataclass(frozen=True)
class Row:
    """One case, and what was measured in it."""

    case: dict[str, str | int]
    figures: dict[str, Figure]


@dataclass(frozen=True)
class Result:
    """What a benchmark found."""

    rows: list[Row]
    notes: list[str]
    """What a reader must know to read the rows right."""


def alternate(
    sides: Mapping[str, Side], *, rounds: int, warmup: int = 1, clock: Callable[[], float] = timer
) -> dict[str, list[Turn]]:
    """Every side once a round, in an order that turns around from round to round; `warmup` rounds more that do not
    count. → each side's turns, `rounds` of them."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            begin = clock()
            amount = sides[name]()
            taken = Turn(clock() - begin, 1.0 if amount is None else amount)
            if number >= warmup:
                turns[name].append(taken)
    return turns


def milliseconds(turns: Iterable[Turn]) -> Figure:
    """How long a turn takes."""
    return Figure.of((1e3 * turn.seconds for turn in turns), "ms")


def rate(turns: Iterable[Turn], unit: str) -> Figure:
    """Amount a second."""
    return Figure.of((turn.amount / turn.seconds for turn in turns), unit)


def ratio(theirs: Iterable[Turn], ours: Iterable[Turn]) -> Figure:
    """How many times as fast ours is for the same amount: above 1 we win. Round by round, then the median."""
    pairs = zip(theirs, ours, strict=True)
    return Figure.of(((a.seconds / a.amount) / (b.seconds / b.amount) for a, b in pairs), "×")


def profile_rows(work: Callable[[], object], *, longest: int = 15) -> list[Row]:
    """Shares of one call of `work`, in percent: the operators' own time, or the kernels' where there is a GPU."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as measured:
        work()
        timer()  # which waits for the GPU
    spent: Counter[str] = Counter()
    for event in measured.key_averages():
        spent[event.key[:90]] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = spent.total() or 1
    return [
        Row({"kernel" if on_gpu else "operator": name}, {"share": Figure.of([100.0 * time / total], "%")})
        for name, time in spent.most_common(longest)
    ]


def as_text(result: Result, ceiling: Mapping[str, Figure], machine: Mapping[str, object]) -> str:
    """Machine and ceiling, a table for each run of rows with the same columns, the notes."""
    parts = [", ".join(f"{name} {value}" for name, value in machine.items())]
    parts.append("ceiling: " + ", ".join(f"{name} {figure.text()} {figure.unit}" for name, figure in ceiling.items()))
    for columns, rows in groupby(result.rows, _columns):
        cells = [(*map(str, r.case.values()), *(figure.text() for figure in r.figures.values())) for r in rows]
        parts.append(aligned([columns, *cells]))
    return "\n\n".join((*parts, "\n".join(result.notes)))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal; the first row has the headings."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def _columns(row: Row) -> tuple[str, ...]:
    """Headings: the case's keys, then the figures with their units."""
    return (*row.case, *(f"{name} {figure.unit}" for name, figure in row.figures.items()))


def as_json(bench: str, result: Result, ceiling: Mapping[str, Figure], machine: Mapping[str, object]) -> str:
    """One line, with every figure: median, quartiles, count and unit."""
    own = {name: asdict(figure) for name, figure in ceiling.items()}
    tree = {"bench": bench, **asdict(result), "ceiling": own, "machine": dict(machine)}
    return json.dumps(tree, ensure_ascii=False, allow_nan=False)
