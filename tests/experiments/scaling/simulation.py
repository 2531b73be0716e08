"""Ladders with known truth and the noise of our own runs: how often is the verdict right? The way of before beside it.

`python tests/experiments/scaling/simulation.py POINTS.json … [--draws 1000]` takes the baseline's law and the noise of
each rung (what a seed does to both of a pair, and what is left of a pair's difference) from finished ladders, lets the
planner choose rungs and seeds that decide a gain of 5 %, and draws such ladders at a gain of 1.05, of 1/1.05 and of
none. It prints a JSON object; the way of before, which is slow, gets a fifth of the draws.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mai_thinking.experiments.scaling.analysis import analyse
from mai_thinking.experiments.scaling.baseline import BaselineFit, Curve, fit_baseline, interval, seed_noise
from mai_thinking.experiments.scaling.gain import efficiency
from mai_thinking.experiments.scaling.points import Point, PointSet, read_points
from mai_thinking.experiments.scaling.power import Pilot, propose
from mai_thinking.experiments.scaling.power_law import Array, PowerLaw

DIFFERENCE = 0.05
REPLICATES = 50


@dataclass(frozen=True)
class Truth:
    """A ladder to draw from."""

    law: PowerLaw
    depths: list[int]
    costs_R: Array
    common_R: Array
    """Standard deviation of what a seed does to both runs of a pair, in log loss."""
    own_R: Array
    """Standard deviation of the difference of a pair."""
    seconds_R: Array

    @classmethod
    def of(cls, points: PointSet) -> "Truth":
        """From a finished ladder's headline score: the variances are means over its candidates."""
        analysis = analyse(points, replicates=REPLICATES)
        fit = analysis.fits[points.headline, "flops"]
        assert fit.problem is None, fit.problem
        logs = {(p.config, p.rung, p.seed): np.log(points.score(p, points.headline)) for p in points.points}
        depths = [rung[0].rung for rung in points.rungs(points.baseline) if rung[0].rung is not None]
        common, own = [], []
        for depth in depths:
            seeds = sorted(seed for config, rung, seed in logs if (config, rung) == (points.baseline, depth))
            base = np.array([logs[points.baseline, depth, seed] for seed in seeds])
            differences = [
                np.array([logs[candidate, depth, seed] for seed in seeds if (candidate, depth, seed) in logs])
                - np.array([logs[points.baseline, depth, seed] for seed in seeds if (candidate, depth, seed) in logs])
                for candidate in analysis.candidates
            ]
            variance = float(np.mean([d.var(ddof=1) for d in differences if len(d) > 1]))
            own.append(np.sqrt(variance))
            common.append(np.sqrt(max(0.0, float(base.var(ddof=1)) - variance / 2)))
        medians = [np.median([p.seconds or p.flops for p in points.points if p.rung == d]) for d in depths]
        return cls(fit.law, depths, fit.curve.costs_R, np.array(common), np.array(own), np.array(medians))

    def seeds(self, difference: float) -> dict[int, int]:
        """What the planner asks for, with any amount of time."""
        steps = 1.01
        slopes_R = np.log(self.law.loss(self.costs_R) / self.law.loss(self.costs_R * steps)) / np.log(steps)
        rungs = [
            Pilot(depth, float(cost), float(seconds), float(own / slope), 100)
            for depth, cost, seconds, own, slope in zip(
                self.depths, self.costs_R, self.seconds_R, self.own_R, slopes_R, strict=True
            )
        ]
        plan, _ = propose(rungs, np.inf, difference)
        assert plan is not None
        return plan.seeds

    def draw(self, gain: float, seeds: dict[int, int], rng: np.random.Generator) -> PointSet:
        """A ladder whose candidate needs 1/gain of the cost for the same loss."""
        points = []
        for depth, cost, common, own in zip(self.depths, self.costs_R, self.common_R, self.own_R, strict=True):
            for seed in range(seeds.get(depth, 0)):
                both = common * rng.standard_normal()
                for config, at in (("base", cost), ("new", cost * gain)):
                    loss = self.law.loss(at) * np.exp(both + own / np.sqrt(2) * rng.standard_normal())
                    points.append(Point(config=config, seed=seed, flops=cost, rung=depth, loss={"loss": float(loss)}))
        return PointSet(baseline="base", points=tuple(points), difference=DIFFERENCE)


def verdict(points: PointSet, rng: np.random.Generator) -> str:
    """As `analyse` comes to it, without what else it tells."""
    curves = [Curve.of(points, config, points.headline, "flops") for config in points.configs]
    fit = fit_baseline(curves[0], seed_noise(curves), rng, REPLICATES)
    return efficiency(points, fit, "new", points.headline, "flops").verdict[0]


def verdict_of_before(points: PointSet, rng: np.random.Generator) -> str:
    """Both sides fitted, nothing paired: adopt if the interval of the fitted gain lies above 1 at the largest rung and
    one rung on, reject if below at both. The candidate's curve is fitted as the baseline's is."""
    curves = [Curve.of(points, config, points.headline, "flops") for config in points.configs]
    base, new = (fit_baseline(curve, seed_noise(curves), rng, REPLICATES) for curve in curves)
    if base.problem or new.problem or len(base.curve.costs_R) < 4:
        return "undecided"
    ends = [interval(_gains(base, new, at)) for at in (curves[1].costs_R[-1], _next(curves[1].costs_R))]
    if min(low for low, _ in ends) > 1:
        return "adopt"
    return "reject" if max(high for _, high in ends) < 1 else "undecided"


def _gains(base: BaselineFit, new: BaselineFit, cost: float) -> Array:
    return base.replicates.cost(new.replicates.loss(cost)) / cost


def _next(costs_R: Array) -> float:
    return float(costs_R[-1] ** 2 / costs_R[-2])


def simulate(truth: Truth, seeds: dict[int, int], draws: int, *, before: bool, seed: int = 0) -> dict[str, float]:
    """`right` of what is decided, and `undecided`, over both signs of a gain of 5 %; `false_adopt` at no gain."""
    rng = np.random.default_rng(seed)
    said: dict[float, Counter[str]] = {}
    for gain in (1 + DIFFERENCE, 1 / (1 + DIFFERENCE), 1.0):
        said[gain] = Counter()
        for _ in range(draws):
            points = truth.draw(gain, seeds, rng)
            said[gain][verdict_of_before(points, rng) if before else verdict(points, rng)] += 1
    up, down, none = said.values()
    decided = 2 * draws - up["undecided"] - down["undecided"]
    return {
        "right": (up["adopt"] + down["reject"]) / decided if decided else float("nan"),
        "undecided": 1 - decided / (2 * draws),
        "false_adopt": none["adopt"] / draws,
    }


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("points", type=Path, nargs="+")
    parser.add_argument("--draws", type=int, default=1000)
    options = parser.parse_args()
    found = {}
    for path in options.points:
        truth = Truth.of(read_points(path, None))
        seeds = truth.seeds(DIFFERENCE)
        found[path.parent.name] = {
            "noise_of_pairs": truth.own_R.tolist(),
            "noise_of_seeds": np.hypot(truth.common_R, truth.own_R / np.sqrt(2)).tolist(),
            "seeds": seeds,
            "draws": options.draws,
            **simulate(truth, seeds, options.draws, before=False),
            "before": simulate(truth, seeds, options.draws // 5, before=True) | {"draws": options.draws // 5},
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
