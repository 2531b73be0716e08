"""Efficiency gain and the verdict on a candidate (MAI-Thinking-1 report §2.2).

f is the baseline's law and g the candidate's: at cost C the candidate has EG(C) = f⁻¹(g(C)) / C, so that 1.2 means that
the baseline needs 1.2 times as much to come as far. The report takes the candidate's measured loss for g(C); the law
through all of its rungs is the same with less noise, and both are given.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mai_thinking.experiments.scaling.bootstrap import BootstrapFit, interval
from mai_thinking.experiments.scaling.power_law import Array

Verdict = Literal["adopt", "reject", "undecided"]

RULE = (
    "adopt, if under every kind of cost the 95 % interval of the weighted score's efficiency gain lies above 1 at the "
    "largest rung and still does one rung beyond it; reject, if under one kind it lies below 1 at both and under none "
    "above; otherwise undecided. Without a fit of both there is no gain, so nothing is decided."
)


@dataclass(frozen=True)
class Gain:
    """EG at one cost."""

    cost: float
    value: float
    low: float
    high: float
    """95 %; inf where the baseline would never come as far."""
    measured: float | None
    """f⁻¹ of the rung's mean loss, over its cost; None where there is no such rung."""
    beyond: bool
    """Whether the baseline was never measured at so low a loss, or nobody at so high a cost."""


@dataclass(frozen=True)
class Efficiency:
    """A candidate's gain over the baseline under one score and one kind of cost."""

    candidate: str
    score: str
    cost: str
    problem: str | None
    """Why there is no gain to tell."""
    gains: tuple[Gain, ...] = ()
    """At each of the candidate's rungs, and one rung beyond the largest."""

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """What this cost says, and why."""
        if self.problem is not None:
            return "undecided", self.problem
        at, beyond = self.gains[-2:]
        told = f"EG {spell(at)} at the largest rung, {spell(beyond)} one rung on"
        if min(at.low, beyond.low) > 1:
            return "adopt", told
        if max(at.high, beyond.high) < 1:
            return "reject", told
        return "undecided", told


def spell(gain: Gain) -> str:
    """`1.19 [1.12, 1.27]`."""
    return f"{gain.value:.3g} [{gain.low:.3g}, {gain.high:.3g}]"


def efficiency(baseline: BootstrapFit, candidate: BootstrapFit) -> Efficiency:
    """EG at the candidate's rungs and one beyond, or the reason why it cannot be told."""
    curve = candidate.curve
    names = curve.config, curve.score, curve.cost
    for fit in (baseline, candidate):
        if fit.problem is not None:
            return Efficiency(*names, problem=f"{fit.curve.config}: {fit.problem}")
    costs = [*curve.costs_R, next_cost(curve.costs_R)]
    means = [*np.exp(curve.log_means_R), None]
    lowest = float(np.exp(baseline.curve.log_means_R.min()))
    gains = []
    for cost, mean in zip(costs, means, strict=True):
        value = float(gain_at(baseline, candidate, cost))
        low, high = interval(gain_replicates(baseline, candidate, cost))
        measured = None if mean is None else float(baseline.law.cost(mean) / cost)
        beyond = mean is None or float(candidate.law.loss(cost)) < lowest
        gains.append(Gain(float(cost), value, low, high, measured, beyond))
    return Efficiency(*names, problem=None, gains=tuple(gains))


def gain_at(baseline: BootstrapFit, candidate: BootstrapFit, cost: float | Array) -> Array:
    """EG by the two laws."""
    return baseline.law.cost(candidate.law.loss(cost)) / cost


def gain_replicates(baseline: BootstrapFit, candidate: BootstrapFit, cost: float) -> Array:
    """EG by each pair of replicates, [B]."""
    return baseline.replicates.cost(candidate.replicates.loss(cost)) / cost


def next_cost(costs_R: Array) -> float:
    """The cost of a rung as far beyond the largest as that is beyond the one before."""
    return float(costs_R[-1] ** 2 / costs_R[-2])


def overall(by_cost: list[Efficiency]) -> Verdict:
    """`RULE`, over all kinds of cost."""
    said = {efficiency.verdict[0] for efficiency in by_cost}
    if said == {"adopt"}:
        return "adopt"
    return "reject" if "reject" in said and "adopt" not in said else "undecided"
