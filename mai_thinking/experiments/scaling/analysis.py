"""Everything that a set of points can tell: fits, efficiency gains, verdicts, rank crossings; and the same as JSON."""

import math
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mai_thinking.experiments.scaling.bootstrap import REPLICATES, BootstrapFit, Curve, bootstrap, interval, seed_noise
from mai_thinking.experiments.scaling.crossings import Crossing, cross
from mai_thinking.experiments.scaling.efficiency import RULE, Efficiency, Verdict, efficiency, overall
from mai_thinking.experiments.scaling.points import PointSet, report_weights

Key = tuple[str, str, str]
"""(config, score, kind of cost)"""


@dataclass(frozen=True)
class Analysis:
    """The conclusions, in the order in which the page tells them."""

    points: PointSet
    fits: dict[Key, BootstrapFit]
    efficiencies: tuple[Efficiency, ...]
    crossings: tuple[Crossing, ...]

    @property
    def candidates(self) -> list[str]:
        """All configs but the baseline."""
        return self.points.configs[1:]

    def gains(self, candidate: str, score: str) -> list[Efficiency]:
        """A candidate's gains under one score, a kind of cost each."""
        return [e for e in self.efficiencies if e.candidate == candidate and e.score == score]

    def verdict(self, candidate: str) -> Verdict:
        """Adopt, reject or undecided, by `RULE`."""
        return overall(self.gains(candidate, self.points.headline))


def analyse(points: PointSet, *, seed: int = 0, replicates: int = REPLICATES) -> Analysis:
    """Fit, bootstrap and compare all of `points`; the same for the same seed."""
    rng = np.random.default_rng(seed)
    fits: dict[Key, BootstrapFit] = {}
    for cost in points.costs:
        for score in points.scores:
            curves = [Curve.of(points, config, score, cost) for config in points.configs]
            noise = seed_noise(curves)
            for curve in curves:
                fits[curve.config, score, cost] = bootstrap(curve, noise, rng, replicates)
    efficiencies = tuple(
        efficiency(fits[points.baseline, score, cost], fits[config, score, cost])
        for config in points.configs[1:]
        for score in points.scores
        for cost in points.costs
    )
    crossings = tuple(
        cross(fits[first, score, cost], fits[second, score, cost], rng)
        for first, second in combinations(points.configs, 2)
        for score in points.scores
        for cost in points.costs
    )
    return Analysis(points, fits, efficiencies, crossings)


def as_json(analysis: Analysis) -> dict[str, Any]:
    """The analysis as a tree of plain values; some may be infinite."""
    points = analysis.points
    return {
        "baseline": points.baseline,
        "rule": RULE,
        "weights": dict(points.weights or report_weights(points.categories)) if len(points.scores) > 1 else {},
        "points": [point.model_dump() for point in points.points],
        "fits": [_fit_as_json(fit) for fit in analysis.fits.values()],
        "efficiency": [asdict(e) | {"verdict": e.verdict[0], "reason": e.verdict[1]} for e in analysis.efficiencies],
        "verdicts": {candidate: analysis.verdict(candidate) for candidate in analysis.candidates},
        "crossings": [asdict(c) | {"same_at_every_rung": c.same_at_every_rung} for c in analysis.crossings],
    }


def _fit_as_json(fit: BootstrapFit) -> dict[str, Any]:
    curve = fit.curve
    result: dict[str, Any] = {
        "config": curve.config,
        "score": curve.score,
        "cost": curve.cost,
        "runs": curve.runs,
        "rungs": len(curve.costs_R),
        "seed_noise": math.sqrt(fit.seeds.variance) if fit.seeds.freedom else None,
        "problem": fit.problem,
    }
    if fit.problem is None:
        law, replicates = fit.law, fit.replicates
        result["lack_of_fit"] = fit.lack_of_fit
        for name, value, many in (
            ("A", law.A, replicates.A),
            ("alpha", law.alpha, replicates.alpha),
            ("E", law.floor, replicates.floor),
        ):
            low, high = interval(many)
            result[name] = {"value": float(value), "low": low, "high": high}
    return result
