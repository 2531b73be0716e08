"""Where to spend: rungs and seeds that decide a difference in a given time, from a few pilot points.

With n_r pairs at rung r, whose log gains scatter by s_r, the mean over R rungs is known to √(Σ s_r²/n_r)/R, and its
interval reaches a quantile of Student's times that, as in `gain`. A gain of δ is found with 90 % power when log(1 + δ)
is that reach and 1.28 standard errors more. The seconds Σ n_r·c_r that this takes are least with n_r in proportion to
s_r/√c_r (Neyman's allocation).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mai_thinking.experiments.scaling.analysis import Analysis
from mai_thinking.experiments.scaling.gain import reach, student
from mai_thinking.experiments.scaling.points import PointSet

POWER = 0.9
LEAST_PAIRS, MOST_PAIRS = 3, 200
"""Of a rung: with two a single slip decides, and the scatter is a guess."""
_LEAST_RUNGS = 3
_SCALES = np.geomspace(LEAST_PAIRS, 20 * MOST_PAIRS, 160)
"""Pairs of the rung that has most, if `MOST_PAIRS` did not bound them."""


@dataclass(frozen=True)
class Pilot:
    """What is known about one rung."""

    rung: int
    cost: float
    """FLOPs of the baseline's run."""
    seconds: float
    """Of one seed of all configs."""
    spread: float
    """Standard deviation of a pair's log gain: the root mean square over the candidates."""
    freedom: int
    """Degrees of freedom behind it."""


@dataclass(frozen=True)
class Plan:
    """Rungs and seeds."""

    seeds: dict[int, int]
    """Rung → pairs."""
    seconds: float
    least: float
    """The least difference that it decides with a power of 90 %: 0.03 for 3 %."""


def pilots(points: PointSet, analysis: Analysis) -> list[Pilot]:
    """The rungs that have a depth and at least two pairs of some candidate, cheapest first."""
    found = []
    efficiencies = {candidate: analysis.gain(candidate) for candidate in analysis.candidates}
    for rung in points.rungs(points.baseline):
        if (depth := rung[0].rung) is None:
            continue
        times: dict[str, list[float]] = {}
        for p in points.points:
            if p.rung == depth:
                times.setdefault(p.config, []).append(p.wall or p.seconds or p.flops)
        seconds = sum(float(np.median(own)) for own in times.values())
        costs = {(p.config, p.flops) for p in points.points if p.rung == depth}
        every = [(name, gain) for name, e in efficiencies.items() for gain in e.gains]
        gains = [gain for name, gain in every if gain.spread is not None and (name, gain.cost) in costs]
        freedom = sum(gain.pairs - 1 for gain in gains)
        if freedom:
            variance = sum((gain.pairs - 1) * (gain.spread or 0) ** 2 for gain in gains) / freedom
            found.append(Pilot(depth, rung[0].flops, seconds, float(np.sqrt(variance)), freedom))
    return found


def propose(rungs: Sequence[Pilot], seconds: float, difference: float) -> tuple[Plan | None, Plan | None]:
    """(the plan that decides `difference` within `seconds`, or None; the plan that decides the least difference).

    Of all choices of three rungs or more, that which reaches to the largest cost, and among those the quickest. Without
    three rungs that can be paid for, neither.
    """
    deciding: list[Plan] = []
    spent: list[Plan] = []
    for choice in (c for n in range(_LEAST_RUNGS, len(rungs) + 1) for c in combinations(rungs, n)):
        plans = [_plan(choice, scale) for scale in _SCALES]
        deciding += [plan for plan in plans if plan.least <= difference][:1]  # with the fewest pairs
        affordable = [plan for plan in plans if plan.seconds <= seconds]
        spent += [max(affordable, key=lambda plan: plan.seconds)] if affordable else []
    deciding = [plan for plan in deciding if plan.seconds <= seconds]
    largest = max((max(plan.seeds) for plan in deciding), default=0)
    chosen = min((p for p in deciding if max(p.seeds) == largest), key=lambda plan: plan.seconds, default=None)
    return chosen, min(spent, key=lambda plan: plan.least, default=None)


def _plan(choice: Sequence[Pilot], scale: float) -> Plan:
    """Pairs by Neyman's allocation, as many as `scale` says where there are most."""
    spreads_R, seconds_R = (np.array([getattr(rung, name) for rung in choice]) for name in ("spread", "seconds"))
    shares_R = spreads_R / np.sqrt(seconds_R)
    pairs_R = np.clip(np.floor(scale * shares_R / max(1e-300, shares_R.max())), LEAST_PAIRS, MOST_PAIRS)
    parts_R = spreads_R**2 / pairs_R
    off = reach(parts_R, pairs_R - 1, 0.975) / len(choice)
    # The scatter that is found varies too: by the quantile of the pairs there are.
    error = np.sqrt(parts_R.sum()) / len(choice)
    least = float(np.expm1(off + student(POWER, float(pairs_R.sum()) - len(choice)) * error))
    seeds = {rung.rung: int(n) for rung, n in zip(choice, pairs_R, strict=True)}
    return Plan(seeds, float(pairs_R @ seconds_R), least)
