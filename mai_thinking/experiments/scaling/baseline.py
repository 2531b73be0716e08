"""The baseline's ladder: its noise, its law, and how far off that may be (MAI-Thinking-1 report §2.2).

**Noise.** Log-losses of one rung scatter with the seed; the scatter is taken to be one number for a ladder, and pooled
over its configs. If the rungs' means miss the law by more than the seeds explain (an F-test at 5 %), the rungs have
noise of their own, with so few degrees of freedom as there are rungs to spare.

**Replicates.** A parametric bootstrap over both: each replicate adds new seed noise to every run and new rung noise to
every rung of the fitted law, with the standard deviations themselves drawn from what so few runs leave open (scaled
inverse χ²), and is fitted like the original. Drawing runs with replacement, the usual bootstrap, leaves too few rungs
of four or five to fit anything to, and with two seeds underestimates their variance by half.

A candidate's gain needs the law between the rungs and little beyond, so three rungs are enough: with three the law goes
through their means, and the replicates say how well they are known.
"""

from dataclasses import dataclass

import numpy as np

from mai_thinking.experiments.scaling.points import Point, PointSet
from mai_thinking.experiments.scaling.power_law import Array, PowerLaw, fit, refit

LEAST_RUNGS = 3
"""The law has three parameters; a fourth rung is the first that can contradict it."""
LEAST_FREEDOM = 2
"""So many degrees of freedom the noise must be known with, from seeds of all configs and rungs to spare. With 1 the
variance may as well be a thousand times the measured one."""
CHANCE = 0.01
"""If mere scatter shows a fall of the loss like the measured one more often than this, there is nothing to fit."""
INTERVAL = (0.025, 0.975)
REPLICATES = 1000


@dataclass(frozen=True)
class Curve:
    """The runs of one config under one score and one kind of cost, cheapest first."""

    config: str
    score: str
    cost: str
    """`flops` or `seconds`."""
    costs_R: Array  # R rungs
    """Each rung's; of seconds, the median of its runs."""
    losses: tuple[Array, ...]
    """Each rung's losses, one per seed."""

    @classmethod
    def of(cls, points: PointSet, config: str, score: str, cost: str) -> "Curve":
        """Take one curve out of all points; its rungs may be in another order by seconds than by FLOPs."""

        def cost_of(rung: list[Point]) -> float:
            return float(np.median([getattr(point, cost) for point in rung]))

        rungs = sorted(points.rungs(config), key=cost_of)
        losses = tuple(np.array([points.score(point, score) for point in rung]) for rung in rungs)
        return cls(config, score, cost, np.array([cost_of(rung) for rung in rungs]), losses)

    @property
    def runs(self) -> int:
        """Number of runs."""
        return sum(len(losses) for losses in self.losses)

    @property
    def flat(self) -> tuple[Array, Array]:
        """(costs, losses) run by run."""
        return np.repeat(self.costs_R, [len(losses) for losses in self.losses]), np.concatenate(self.losses)


@dataclass(frozen=True)
class Noise:
    """Variance of a log loss, and the degrees of freedom that it is known with."""

    variance: float
    freedom: int

    def draw(self, rng: np.random.Generator, size: int) -> Array:
        """Variances that so few degrees of freedom leave open, [size]."""
        return np.asarray(self.variance * self.freedom / rng.chisquare(self.freedom, size))


def seed_noise(curves: list[Curve]) -> Noise:
    """Scatter within rungs, pooled over `curves`; of freedom 0 where no rung has two seeds."""
    rungs = [np.log(losses) for curve in curves for losses in curve.losses]
    squares = sum(float(((logs - logs.mean()) ** 2).sum()) for logs in rungs)
    freedom = sum(len(logs) - 1 for logs in rungs)
    return Noise(squares / freedom if freedom else 0.0, freedom)


@dataclass(frozen=True)
class BaselineFit:
    """The baseline's law with its replicates, or the reason why there is none."""

    curve: Curve
    seeds: Noise
    """Pooled over the ladder's configs."""
    problem: str | None
    """Why the data cannot support a fit; None if they can."""
    law: PowerLaw
    """Without meaning where there is a problem."""
    replicates: PowerLaw
    """[B] the law under other noise."""
    lack_of_fit: bool
    """Whether the rungs miss the law by more than the seeds explain."""


def fit_baseline(curve: Curve, seeds: Noise, rng: np.random.Generator, replicates: int = REPLICATES) -> BaselineFit:
    """The law of `curve` and its replicates, if it can support a fit at all."""
    problem = _too_little(curve, seeds, rng)
    if problem is not None:
        nothing = PowerLaw(*(np.zeros(0),) * 3, reference=1.0)
        return BaselineFit(curve, seeds, problem, nothing, nothing, False)
    costs_N, losses_N = curve.flat
    law = fit(costs_N, losses_N)
    deviations_BN, lack_of_fit = _noise_like(curve, law, seeds, rng, replicates)
    scale = float(np.sqrt(np.median((deviations_BN**2).mean(1))))
    # A variance known with one degree of freedom may be drawn so large that no float holds what it does.
    refits = refit(law, costs_N, law.loss(costs_N) * np.exp(np.clip(deviations_BN, -50, 50)), scale)
    return BaselineFit(curve, seeds, None, law, refits, lack_of_fit)


def _too_little(curve: Curve, seeds: Noise, rng: np.random.Generator) -> str | None:
    """An F-test of a parabola in log cost against no dependence at all: the law bends, so a line would leave a rest."""
    rungs = len(curve.costs_R)
    if rungs < LEAST_RUNGS:
        return f"{rungs} rung{'s' if rungs != 1 else ''}; a fit needs at least {LEAST_RUNGS}"
    if rungs - 3 + seeds.freedom < LEAST_FREEDOM:
        return f"{curve.runs} runs on {rungs} rungs cannot tell a law from noise; add seeds or rungs"
    costs_N, losses_N = curve.flat
    x, y = np.log(costs_N), np.log(losses_N) - np.log(losses_N).mean()
    spare = len(x) - 3
    rest = float(((y - np.polyval(np.polyfit(x, y, 2), x)) ** 2).sum())
    explained = float((y @ y) - rest) / 2
    error = max(rest / max(1, spare), seeds.variance)
    freedom = spare + seeds.freedom
    if explained <= error * float(np.quantile(rng.f(2, freedom, 20_000), 1 - CHANCE)):
        return "the loss does not change with cost by more than its scatter"
    if np.polyfit(x, y, 1)[0] >= 0:
        return "the loss does not fall with cost"
    return None


def _noise_like(
    curve: Curve, law: PowerLaw, seeds: Noise, rng: np.random.Generator, replicates: int
) -> tuple[Array, bool]:
    """Deviations of log losses, [B, N], and whether the rungs have noise of their own."""
    counts_R = np.array([len(losses) for losses in curve.losses])
    misses_R = np.array([np.log(losses).mean() for losses in curve.losses]) - np.log(law.loss(curve.costs_R))
    spare = len(counts_R) - 3
    rung_of_N = np.repeat(np.arange(len(counts_R)), counts_R)
    fresh_BN = rng.standard_normal((replicates, len(rung_of_N)))
    rungs = Noise(float((counts_R * misses_R**2).sum()) / max(1, spare), spare)
    # F-test by simulation: how often does seed noise alone miss the law by so much?
    by_chance = 0 in (spare, seeds.freedom) or (
        (rng.f(spare, seeds.freedom, 20_000) * seeds.variance > rungs.variance).mean() > 0.05
    )
    if by_chance:
        freedom = seeds.freedom + spare
        pooled = Noise((seeds.variance * seeds.freedom + rungs.variance * spare) / freedom, freedom)
        return fresh_BN * np.sqrt(pooled.draw(rng, replicates))[:, None], False
    per_seed_B = seeds.draw(rng, replicates)
    own_B = np.maximum(0.0, (rungs.draw(rng, replicates) - per_seed_B) / counts_R.mean())
    fresh_BR = rng.standard_normal((replicates, len(counts_R)))
    return fresh_BN * np.sqrt(per_seed_B)[:, None] + (fresh_BR * np.sqrt(own_B)[:, None])[:, rung_of_N], True


def interval(values_B: Array) -> tuple[float, float]:
    """The 95 % interval of replicates; an end may be ±inf."""
    ordered = np.sort(values_B)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in INTERVAL)
    return float(low), float(high)
