"""Rank crossings: does the order of two configs hold as cost grows (MAI-Thinking-1 report §2.5.2)?

Where both configs follow their laws, the crossing is where the two fitted curves meet, inside the measured range or
beyond it. Where one does not (a mix that is exhausted may get worse again, which no power law does), it is where the
lines between the rungs' means meet, and nothing is said of what lies beyond the largest rung.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mai_thinking.experiments.scaling.bootstrap import REPLICATES, BootstrapFit, Curve, interval
from mai_thinking.experiments.scaling.power_law import Array

HORIZON = 1e4
"""Curves are followed to so many times the largest measured cost."""
_GRID = 800
_TIE = 2.0
"""A difference of less than so many standard errors is a tie."""
SETTLED = 3.0
"""A rung settles the order where the difference to expect is so many standard errors of its measurement."""

Status = Literal["crosses inside", "crosses beyond", "no crossing", "none inside", "undecided"]
"""`no crossing` is up to the horizon, `none inside` between the rungs, beyond which lines tell nothing."""


@dataclass(frozen=True)
class RungOrder:
    """Two configs at one rung."""

    cost: float
    difference: float
    """log loss of the first less that of the second: negative where the first is better."""
    error: float | None
    """Its standard error from the seeds; None where nothing has two."""
    better: str | None
    """None is a tie."""


@dataclass(frozen=True)
class Crossing:
    """What is known about the order of two configs under one score and one kind of cost."""

    first: str
    second: str
    score: str
    cost: str
    rungs: tuple[RungOrder, ...]
    method: Literal["laws", "lines between rungs"]
    status: Status
    at: float | None
    """The cost at which the order changes."""
    low: float | None
    high: float | None
    """95 %; inf: it may not change within the horizon."""
    better_below: str | None
    """Which config is the better one at costs below `at`."""
    settled_by: float | None
    """The smallest cost of a further rung that would settle the order there; None where none does or none is needed."""
    settled_depth: int | None
    """About the depth of that rung, where depths are known."""

    @property
    def same_at_every_rung(self) -> bool:
        """Whether no two rungs contradict each other, ties aside."""
        return len({rung.better for rung in self.rungs} - {None}) <= 1


def cross(first: BootstrapFit, second: BootstrapFit, rng: np.random.Generator) -> Crossing:
    """Compare two configs; their costs must be of one kind."""
    lawful = all(fit.problem is None and not fit.lack_of_fit for fit in (first, second))
    status, at, low, high, sign_below = _by_laws(first, second) if lawful else _by_lines(first, second, rng)
    below = None if at is None else (first if sign_below < 0 else second).curve.config
    open_ = lawful and status in ("crosses beyond", "undecided")
    settled_by = _settling_cost(first, second, at) if open_ else None
    return Crossing(
        first=first.curve.config,
        second=second.curve.config,
        score=first.curve.score,
        cost=first.curve.cost,
        rungs=_orders(first, second),
        method="laws" if lawful else "lines between rungs",
        status=status,
        at=at,
        low=low,
        high=high,
        better_below=below,
        settled_by=settled_by,
        settled_depth=None if settled_by is None else _depth(first.curve, settled_by),
    )


Found = tuple[Status, float | None, float | None, float | None, int]
"""Status, crossing, its interval, and the sign of the difference below it."""


def _by_laws(first: BootstrapFit, second: BootstrapFit) -> Found:
    costs = np.concatenate([first.curve.costs_R, second.curve.costs_R])
    largest = float(costs.max())
    grid_G = np.geomspace(costs.min(), largest * HORIZON, _GRID)
    difference_G = np.log(first.law.loss(grid_G)) - np.log(second.law.loss(grid_G))
    differences_BG = np.log(first.replicates[:, None].loss(grid_G)) - np.log(second.replicates[:, None].loss(grid_G))
    return _judge(grid_G, difference_G, differences_BG, largest)


def _by_lines(first: BootstrapFit, second: BootstrapFit, rng: np.random.Generator) -> Found:
    costs_R, difference_R, error_R = _differences(first, second)
    seeds = first.seeds
    if len(costs_R) < 2 or seeds.freedom == 0:  # without known scatter no difference can be told from chance
        return "undecided", None, None, None, 0
    spread_B = np.sqrt(seeds.draw(rng, REPLICATES) / seeds.variance) if seeds.variance else np.zeros(REPLICATES)
    fresh_BR = rng.standard_normal((REPLICATES, len(costs_R)))
    differences_BR = difference_R + fresh_BR * spread_B[:, None] * error_R
    grid_G = np.geomspace(costs_R[0], costs_R[-1], _GRID)
    at_G = np.log(grid_G)
    lines_BG = np.stack([np.interp(at_G, np.log(costs_R), row_R) for row_R in differences_BR])
    found = _judge(grid_G, np.interp(at_G, np.log(costs_R), difference_R), lines_BG, costs_R[-1])
    return ("none inside", *found[1:]) if found[0] == "no crossing" else found


def _judge(grid_G: Array, difference_G: Array, differences_BG: Array, largest: float) -> Found:
    """Where the sign of the difference changes, and how sure that is."""
    roots = _roots(grid_G, difference_G)
    if not len(roots):
        crossed = (np.sign(differences_BG) != np.sign(difference_G[0])).any(1)
        return ("no crossing" if crossed.mean() < 0.05 else "undecided"), None, None, None, 0
    at = float(roots[-1])
    below = int(np.sign(difference_G[np.searchsorted(grid_G, at) - 1]))
    found = []
    for row_G in differences_BG:
        own = _roots(grid_G, row_G)
        if len(own):
            found.append(float(own[np.abs(np.log(own / at)).argmin()]))
        else:  # the order of below, or that of above, at all costs
            found.append(np.inf if np.sign(row_G[0]) == below else -np.inf)
    low, high = interval(np.array(found))
    status: Status = "undecided"
    if np.isfinite(low) and np.isfinite(high):
        if high <= largest:
            status = "crosses inside"
        elif low > largest:
            status = "crosses beyond"
    return status, at, low, high, below


def _roots(grid_G: Array, difference_G: Array) -> Array:
    """Costs at which the difference changes its sign, interpolated in log cost."""
    index = np.nonzero(np.sign(difference_G[:-1]) * np.sign(difference_G[1:]) < 0)[0]
    left, right = difference_G[index], difference_G[index + 1]
    share = left / (left - right)
    return np.asarray(np.exp(np.log(grid_G[index]) * (1 - share) + np.log(grid_G[index + 1]) * share))


def _differences(first: BootstrapFit, second: BootstrapFit) -> tuple[Array, Array, Array]:
    """Rung by rung, the smallest first: mean cost, difference of mean log losses, its standard error."""
    rungs = min(len(first.curve.costs_R), len(second.curve.costs_R))
    costs_R = np.sqrt(first.curve.costs_R[:rungs] * second.curve.costs_R[:rungs])
    difference_R = first.curve.log_means_R[:rungs] - second.curve.log_means_R[:rungs]
    pairs = zip(first.curve.losses[:rungs], second.curve.losses[:rungs], strict=True)
    error_R = np.array([np.sqrt(first.seeds.variance * (1 / len(a) + 1 / len(b))) for a, b in pairs])
    return costs_R, difference_R, error_R


def _orders(first: BootstrapFit, second: BootstrapFit) -> tuple[RungOrder, ...]:
    known = first.seeds.freedom > 0
    orders = []
    for cost, difference, error in zip(*_differences(first, second), strict=True):
        better = (first if difference < 0 else second).curve.config
        tie = difference == 0 or (known and abs(difference) < _TIE * error)
        error_or_none = float(error) if known else None
        orders.append(RungOrder(float(cost), float(difference), error_or_none, None if tie else better))
    return tuple(orders)


def _settling_cost(first: BootstrapFit, second: BootstrapFit, crossing: float | None) -> float | None:
    """The first rung on from the largest, at the ladder's own ratio and past the crossing, if there is one, that would
    tell the two apart by itself."""
    noise = first.seeds
    if noise.freedom == 0:
        return None
    costs_R = first.curve.costs_R
    runs = min(len(first.curve.losses[-1]), len(second.curve.losses[-1]))
    error = float(np.sqrt(2 * noise.variance / runs))
    ratio = float(costs_R[-1] / costs_R[-2])
    cost = float(costs_R[-1]) * ratio
    while cost <= costs_R[-1] * HORIZON:
        difference = abs(float(np.log(first.law.loss(cost)) - np.log(second.law.loss(cost))))
        if cost > (crossing or 0) and difference > SETTLED * error:
            return cost
        cost *= ratio
    return None


def _depth(curve: Curve, cost: float) -> int | None:
    """The depth of a rung of so much cost: cost is taken as a power of the depth, as between the last two rungs."""
    if len(curve.depths) < 2 or curve.depths[-1] is None or curve.depths[-2] is None:
        return None
    power = np.log(curve.costs_R[-1] / curve.costs_R[-2]) / np.log(curve.depths[-1] / curve.depths[-2])
    return round(curve.depths[-1] * float(cost / curve.costs_R[-1]) ** (1 / power))
