"""Everything that a set of points can tell: the baseline's law, efficiency gains, verdicts, crossings; also as JSON."""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mai_thinking.experiments.scaling.baseline import REPLICATES, BaselineFit, Curve, fit_baseline, interval, seed_noise
from mai_thinking.experiments.scaling.crossings import Crossing, cross
from mai_thinking.experiments.scaling.gain import RULE, Efficiency, Verdict, efficiency
from mai_thinking.experiments.scaling.points import PointSet, report_weights

Key = tuple[str, str]
"""(score, kind of cost)"""


@dataclass(frozen=True)
class Analysis:
    """The conclusions, in the order in which the page tells them."""

    points: PointSet
    fits: dict[Key, BaselineFit]
    efficiencies: tuple[Efficiency, ...]
    crossings: tuple[Crossing, ...]

    @property
    def candidates(self) -> list[str]:
        """All configs but the baseline."""
        return self.points.configs[1:]

    def gain(self, candidate: str, cost: str = "flops", score: str | None = None) -> Efficiency:
        """A candidate's gain by one kind of cost, under the headline score unless another is named."""
        key = candidate, score or self.points.headline, cost
        return next(e for e in self.efficiencies if (e.candidate, e.score, e.cost) == key)

    def verdict(self, candidate: str) -> Verdict:
        """Adopt, reject or undecided, by `RULE`."""
        return self.gain(candidate).verdict[0]


def analyse(points: PointSet, *, seed: int = 0, replicates: int = REPLICATES) -> Analysis:
    """Fit the baseline and compare all others with it; the same for the same seed."""
    rng = np.random.default_rng(seed)
    fits: dict[Key, BaselineFit] = {}
    for cost in points.costs:
        for score in points.scores:
            curves = [Curve.of(points, config, score, cost) for config in points.configs]
            fits[score, cost] = fit_baseline(curves[0], seed_noise(curves), rng, replicates)
    every = itertools.product(points.configs[1:], points.scores, points.costs)
    efficiencies = tuple(efficiency(points, fits[score, cost], config, score, cost) for config, score, cost in every)
    crossings = tuple(cross(e, points.baseline, rng) for e in efficiencies if e.problem is None)
    return Analysis(points, fits, efficiencies, crossings)


def ranked_right(points: PointSet) -> dict[str, list[float]]:
    """Score → for each rung below the largest, cheapest first, the share of pairs of configs that stand there in the
    same order as at the largest: how far a cheap rung can be trusted to rank (DataDecide's decision accuracy)."""
    rungs = [points.rungs(config) for config in points.configs]
    shared = min(map(len, rungs))
    found: dict[str, list[float]] = {}
    for score in points.scores:
        means_CR = np.array(
            [[np.mean([points.score(p, score) for p in rung]) for rung in own[-shared:]] for own in rungs]
        )
        first_P, second_P = np.triu_indices(len(rungs), 1)
        signs_PR = np.sign(means_CR[first_P] - means_CR[second_P])
        found[score] = (signs_PR[:, :-1] == signs_PR[:, -1:]).mean(axis=0).tolist()
    return found


def as_json(analysis: Analysis) -> dict[str, Any]:
    """The analysis as a tree of plain values; some may be infinite."""
    points = analysis.points
    return {
        "baseline": points.baseline,
        "rule": RULE,
        "difference": points.difference,
        "weights": dict(points.weights or report_weights(points.categories)) if len(points.scores) > 1 else {},
        "points": [point.model_dump() for point in points.points],
        "fits": [_fit_as_json(fit) for fit in analysis.fits.values()],
        "efficiency": [
            asdict(e)
            | {name: getattr(e, name)._asdict() for name in ("mean", "largest", "trend")}
            | {"verdict": e.verdict[0], "reason": e.verdict[1]}
            for e in analysis.efficiencies
        ],
        "verdicts": {candidate: analysis.verdict(candidate) for candidate in analysis.candidates},
        "ranked_right": ranked_right(points),
        "crossings": [asdict(crossing) for crossing in analysis.crossings],
    }


def _fit_as_json(fit: BaselineFit) -> dict[str, Any]:
    curve = fit.curve
    result: dict[str, Any] = {name: getattr(curve, name) for name in ("config", "score", "cost", "runs")}
    result["rungs"] = len(curve.costs_R)
    result["seed_noise"] = math.sqrt(fit.seeds.variance) if fit.seeds.freedom else None
    result["problem"] = fit.problem
    if fit.problem is None:
        result["lack_of_fit"] = fit.lack_of_fit
        for name, field in (("A", "A"), ("alpha", "alpha"), ("E", "floor")):
            low, high = interval(getattr(fit.replicates, field))
            result[name] = {"value": float(getattr(fit.law, field)), "low": low, "high": high}
    return result
