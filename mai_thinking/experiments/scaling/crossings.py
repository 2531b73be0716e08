"""Rank crossings: does the order of baseline and candidate hold as cost grows (MAI-Thinking-1 report §2.5.2)?

A crossing is where the efficiency gain goes through 1. Between the rungs the gain is taken to be a line in log cost; of
what lies beyond the largest rung nothing is said, since a mix that is exhausted follows no law.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mai_thinking.experiments.scaling.baseline import REPLICATES, interval
from mai_thinking.experiments.scaling.gain import Efficiency
from mai_thinking.experiments.scaling.power_law import Array

_TWO_SIDED = 3.92
"""Standard errors in a 95 % interval."""
Status = Literal["crosses", "no crossing", "undecided"]


@dataclass(frozen=True)
class Crossing:
    """What is known about the order of a candidate and the baseline under one score and one kind of cost."""

    candidate: str
    score: str
    cost: str
    better: tuple[str | None, ...]
    """Which of the two is better at each rung, cheapest first; None where the gain's interval contains 1."""
    status: Status
    at: float | None
    """The cost at which the order changes; the last, if it changes more than once."""
    low: float | None
    high: float | None
    """95 %; inf: it may not change between the rungs."""


def cross(efficiency: Efficiency, baseline: str, rng: np.random.Generator) -> Crossing:
    """Follow the gain from rung to rung."""
    e = efficiency
    names = e.candidate, e.score, e.cost
    known = [gain for gain in e.gains if gain.low > 0 and np.isfinite(gain.high)]
    better = tuple(e.candidate if g.low > 1 else baseline if g.high < 1 else None for g in e.gains)
    if len(known) < 2:
        return Crossing(*names, better, "undecided", None, None, None)
    known.sort(key=lambda gain: gain.cost)
    x_R, y_R = np.log([gain.cost for gain in known]), np.log([gain.value for gain in known])
    error_R = np.log([gain.high / gain.low for gain in known]) / _TWO_SIDED
    drawn_BR = y_R + rng.standard_normal((REPLICATES, len(known))) * error_R
    roots_B = np.array([_last_root(x_R, row_R) for row_R in drawn_BR])
    at, crossed_B = _last_root(x_R, y_R), np.isfinite(roots_B)
    if np.isnan(at):
        return Crossing(*names, better, "no crossing" if crossed_B.mean() < 0.05 else "undecided", None, None, None)
    # Without a root a replicate keeps the order of the cheapest rung at all costs, or that of the largest.
    beyond_B = np.where(np.sign(drawn_BR[:, 0]) == np.sign(y_R[0]), np.inf, -np.inf)
    low, high = (float(np.exp(end)) for end in interval(np.where(crossed_B, roots_B, beyond_B)))
    ends_alike = (np.sign(drawn_BR[:, [0, -1]]) == np.sign(y_R[[0, -1]])).all(axis=1).mean()
    sure = ends_alike >= 0.95 and y_R[0] * y_R[-1] < 0 and low > 0 and np.isfinite(high)
    return Crossing(*names, better, "crosses" if sure else "undecided", float(np.exp(at)), low, high)


def _last_root(x_R: Array, y_R: Array) -> float:
    """Where a line through the rungs last goes through 0; NaN if it does not."""
    changes = np.nonzero(y_R[:-1] * y_R[1:] < 0)[0]
    if not len(changes):
        return float("nan")
    i = changes[-1]
    return float(x_R[i] + (x_R[i + 1] - x_R[i]) * y_R[i] / (y_R[i] - y_R[i + 1]))
