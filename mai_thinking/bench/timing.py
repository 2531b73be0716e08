"""Timing sides against each other: in turn, many times, with medians, quartiles and ratios round by round.

A machine's clock rate, caches and neighbours change over minutes, and so do means. What one round's sides have in
common drops out of their ratio; what struck a single turn drops out of a median.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import NamedTuple

Side = Callable[[], float | None]
"""Does its work once, and may say how much of it there was."""


class Turn(NamedTuple):
    """One side's part in one round."""

    seconds: float
    amount: float
    """What the side returned; 1 if it returned nothing."""


@dataclass(frozen=True)
class Figure:
    """Something that was measured `count` times."""

    median: float
    low: float
    """The first quartile."""
    high: float
    """The third."""
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


def alternate(
    sides: Mapping[str, Side], *, rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
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


def fastest(turns: Mapping[str, list[Turn]]) -> str:
    """The side with the lowest median time for an amount."""
    return min(turns, key=lambda name: median(turn.seconds / turn.amount for turn in turns[name]))
