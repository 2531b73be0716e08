"""Efficiency gain and the verdict on a candidate (MAI-Thinking-1 report §2.2).

f is the baseline's law. A candidate that comes to loss L′ at cost C′ has EG = f⁻¹(L′)/C′: 1.2 means that the baseline
needs 1.2 times as much to come as far. Nothing is fitted to the candidate.

**Pairs.** Runs of one rung and seed read the same rows and begin with the same numbers, so most of what makes a seed
good or bad is common to both and cancels: L′ is taken relative to the pair's own baseline run, as
f(C)·L′/L. Each pair so gives one EG, and a rung's interval is Student's over its pairs. Where baseline and candidate
have no seeds in common L′ is taken as it is.

**All rungs.** The mean over the rungs and the line through them are fixed weighings of the rungs' log gains. Each
rung has its own scatter, known with few degrees of freedom, and there is no exact interval for such a sum. The
narrower of two is taken. Banerjee (1961) gives each part Student's quantile of its own rung, which never covers less
than it says: narrow where one rung is most of the scatter, twice too wide where several are alike. Satterthwaite
(1946) takes one quantile, of the degrees of freedom that the parts have together, which by itself took up to 6 % of
gains of nothing for gains. With the fewest that any rung has for all of them, and 0.8 of the probability to miss, it
is 2.5 % and less where variances differ up to ten times, and 3.4 % at the worst. The spread over the replicates of f
is added. A rung of one pair takes the scatter of all rungs together, as known with one degree of freedom; where no
rung has two, the scatter about the line stands for it.

Shape suffixes: R rungs, P pairs of one rung, B replicates of the law.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from mai_thinking.experiments.scaling.baseline import BaselineFit
from mai_thinking.experiments.scaling.points import Point, PointSet
from mai_thinking.experiments.scaling.power_law import Array, PowerLaw

Verdict = Literal["adopt", "reject", "undecided"]

RULE = (
    "by EG_FLOPs of the headline score, over all rungs. adopt: the 95 % interval of the mean gain lies above 1, and "
    "the gain holds up as cost grows: the line through the rungs is above 1 at the largest; if the gain falls with "
    "cost (at 5 %), its whole interval is, and that of the largest rung itself. reject: the same below 1; or the "
    "interval excludes a gain as large as the difference that the ladder asks for, and the gain does not rise with "
    "cost. Otherwise undecided. EG_Time is judged in the same way and told beside it: seconds are this machine's."
)
_FARTHEST = float(np.log(1000))
"""Log gains beyond are taken for so much: f⁻¹ of a loss that the baseline never reaches is infinite."""
_TOGETHER = 0.8
"""Of the probability to miss, where the degrees of freedom are an estimate."""


class Estimate(NamedTuple):
    """A factor with its 95 % interval."""

    value: float
    low: float
    high: float


_NOTHING = Estimate(1.0, 0.0, float("inf"))


@dataclass(frozen=True)
class Gain:
    """EG at one rung."""

    cost: float
    """The candidate's."""
    value: float
    low: float
    high: float
    """95 %"""
    pairs: int
    spread: float | None
    """Standard deviation of a pair's log gain; None of one pair."""
    beyond: bool
    """Whether the baseline was never measured at so low a loss."""


@dataclass(frozen=True)
class Efficiency:
    """A candidate's gain over the baseline under one score and one kind of cost."""

    candidate: str
    score: str
    cost: str
    difference: float
    """The gain that is worth having: 0.03 for 3 %."""
    problem: str | None
    """Why there is no gain to tell."""
    gains: tuple[Gain, ...] = ()
    """At each of the candidate's rungs."""
    mean: Estimate = _NOTHING
    """Over the rungs, each counted alike."""
    largest: Estimate = _NOTHING
    """Of the line through the rungs, at the largest."""
    trend: Estimate = _NOTHING
    """The factor by which the gain changes when the cost grows tenfold."""
    falls: bool = False
    rises: bool = False
    """Whether the trend lies below, or above, 1 at 5 %, one-sided."""
    paired: bool = False
    kept_variance: float | None = None
    """What pairing leaves of the variance of a difference of log losses; None where it is not known."""

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """What this cost says, and why."""
        if self.problem is not None:
            return "undecided", self.problem
        told = f"mean EG {spell(self.mean)}, ×{spell(self.trend)} a decade of cost"
        ends = (self.largest, self.gains[-1])
        lows, highs = [end.low for end in ends], [end.high for end in ends]
        if self.mean.low > 1 and self.largest.value > 1 and (not self.falls or min(lows) > 1):
            return "adopt", told
        if self.mean.high < 1 and self.largest.value < 1 and (not self.rises or max(highs) < 1):
            return "reject", told
        if self.mean.high < 1 + self.difference and self.mean.low <= 1 and not self.rises:
            return "reject", f"{told}; a gain of {self.difference:.0%} is excluded"
        return "undecided", told


def spell(estimate: Estimate | Gain) -> str:
    """`1.19 [1.12, 1.27]`."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def efficiency(points: PointSet, baseline: BaselineFit, candidate: str, score: str, cost: str) -> Efficiency:
    """EG at the candidate's rungs, its mean and its trend, or the reason why it cannot be told."""
    names = candidate, score, cost, points.difference
    if baseline.problem is not None:
        return Efficiency(*names, problem=f"{points.baseline}: {baseline.problem}")
    rungs = [_Rung.of(points, rung, score, cost) for rung in points.rungs(candidate)]
    if len(rungs) < 2:
        return Efficiency(*names, problem="one rung tells nothing of how the gain changes with cost; add rungs")
    x_R = np.log([rung.cost for rung in rungs])
    errors = _Errors.of(rungs, baseline, x_R)
    if errors is None:
        return Efficiency(*names, problem="single pairs on two rungs have no scatter to judge by; add seeds or rungs")
    centred_R = x_R - x_R.mean()
    slope_R = centred_R / (centred_R**2).sum()
    mean_R = np.full(len(rungs), 1 / len(rungs))
    trend, sure = errors.weigh(slope_R * np.log(10), 0.95)
    lowest = min(float(np.log(losses).mean()) for losses in baseline.curve.losses)
    gains = []
    for rung, weights_R in zip(rungs, np.eye(len(rungs)), strict=True):
        logs_P = rung.log_gains(baseline.law)
        spread = float(np.std(logs_P, ddof=1)) if len(logs_P) > 1 else None
        beyond = float(rung.own_logs_P.mean()) < lowest
        gains.append(Gain(rung.cost, *errors.estimate(weights_R), len(logs_P), spread, beyond))
    pairs = [rung for rung in rungs if rung.logs_P is not None]
    return Efficiency(
        *names,
        problem=None,
        gains=tuple(gains),
        mean=errors.estimate(mean_R),
        largest=errors.estimate(mean_R + centred_R[-1] * slope_R),
        trend=errors.estimate(slope_R * np.log(10)),
        falls=trend + sure < 0,
        rises=trend - sure > 0,
        paired=bool(pairs),
        kept_variance=_kept_variance(pairs),
    )


@dataclass(frozen=True)
class _Rung:
    """A candidate's rung, as pairs or alone."""

    cost: float
    own_costs_P: Array
    own_logs_P: Array
    """log L′"""
    costs_P: Array | None = None
    logs_P: Array | None = None
    """Of the same seeds of the baseline; None without common seeds."""

    @classmethod
    def of(cls, points: PointSet, rung: list[Point], score: str, cost: str) -> "_Rung":
        of_baseline = next((r for r in points.rungs(points.baseline) if _same_rung(r[0], rung[0])), [])
        own, base = (
            {p.seed: (float(getattr(p, cost)), float(np.log(points.score(p, score)))) for p in members}
            for members in (rung, of_baseline)
        )
        median = float(np.median([c for c, _ in own.values()]))
        common = sorted(own.keys() & base.keys())
        if not common:
            return cls(median, *np.array(list(own.values())).T)
        return cls(median, *(column for by in (own, base) for column in np.array([by[seed] for seed in common]).T))

    def log_gains(self, law: PowerLaw) -> Array:
        """log EG of each pair under one law, [P], or under a batch of B, [B, P]."""
        if self.logs_P is None or self.costs_P is None:
            losses = np.exp(self.own_logs_P)
        else:
            losses = law.loss(self.costs_P) * np.exp(self.own_logs_P - self.logs_P)
        with np.errstate(over="ignore"):
            return np.clip(np.log(law.cost(losses)) - np.log(self.own_costs_P), -_FARTHEST, _FARTHEST)


def _same_rung(one: Point, other: Point) -> bool:
    """By depth where both have one, otherwise by nearly equal FLOPs."""
    if one.rung is not None and other.rung is not None:
        return one.rung == other.rung
    return max(one.flops, other.flops) <= 1.02 * min(one.flops, other.flops)


@dataclass(frozen=True)
class _Errors:
    """How far off weighed sums of the rungs' mean log gains may be."""

    means_R: Array
    variances_R: Array
    """Of a rung's mean, from its pairs."""
    freedoms_R: Array
    replicates_BR: Array

    @classmethod
    def of(cls, rungs: list[_Rung], baseline: BaselineFit, x_R: Array) -> "_Errors | None":
        logs_R = [rung.log_gains(baseline.law) for rung in rungs]
        replicates_BR = np.stack([r.log_gains(baseline.replicates[:, None]).mean(axis=-1) for r in rungs], axis=-1)
        means_R = np.array([logs_P.mean() for logs_P in logs_R])
        counts_R = np.array([len(logs_P) for logs_P in logs_R])
        squares_R = np.array([((logs_P - logs_P.mean()) ** 2).sum() for logs_P in logs_R])
        freedoms_R = counts_R - 1
        if freedoms_R.sum() == 0:
            spare = len(means_R) - 2
            if spare == 0:
                return None
            line_R = np.polyval(np.polyfit(x_R, means_R, 1), x_R)
            pooled = float(((means_R - line_R) ** 2).sum()) / spare
            return cls(means_R, np.full(len(rungs), pooled), np.full(len(rungs), float(spare)), replicates_BR)
        own_R = np.where(freedoms_R > 0, squares_R / np.maximum(1, freedoms_R), squares_R.sum() / freedoms_R.sum())
        return cls(means_R, own_R / counts_R, np.maximum(1.0, freedoms_R), replicates_BR)

    def weigh(self, weights_R: Array, probability: float) -> tuple[float, float]:
        """(sum, how far it may be off to one side with this probability)"""
        own = reach(weights_R**2 * self.variances_R, self.freedoms_R, probability)
        # Half of the middle 68 %, which a few laws that never reach a loss cannot make infinite.
        low, high = np.quantile(self.replicates_BR @ weights_R, (0.16, 0.84))
        of_law = student(probability, 1e6) * float(high - low) / 2
        return float(weights_R @ self.means_R), float(np.hypot(own, of_law))

    def estimate(self, weights_R: Array) -> Estimate:
        value, off = self.weigh(weights_R, 0.975)
        return Estimate(*(float(np.exp(end)) for end in (value, value - off, value + off)))


def reach(variances_R: Array, freedoms_R: Array, probability: float) -> float:
    """How far a sum of independent normal parts may be off to one side with this probability, when their variances
    were found with so many degrees of freedom; the module says how."""
    quantiles_R = np.array([student(probability, freedom) for freedom in freedoms_R])
    apart = float(np.sqrt((quantiles_R**2 * variances_R).sum()))
    if np.count_nonzero(variances_R) < 2:
        return apart
    freedom = float(freedoms_R[variances_R > 0].min() * variances_R.sum() ** 2 / (variances_R**2).sum())
    together = student(1 - _TOGETHER * (1 - probability), round(freedom, 1)) * float(np.sqrt(variances_R.sum()))
    return min(apart, together)


def _kept_variance(rungs: list[_Rung]) -> float | None:
    """Var(log L′ − log L) within rungs, over what it would be if the two were independent."""
    own, apart = 0.0, 0.0
    for rung in rungs:
        assert rung.logs_P is not None
        freedom = len(rung.logs_P) - 1
        if freedom:
            own += freedom * float(np.var(rung.own_logs_P - rung.logs_P, ddof=1))
            apart += freedom * float(np.var(rung.own_logs_P, ddof=1) + np.var(rung.logs_P, ddof=1))
    return own / apart if apart else None


@lru_cache(maxsize=256)
def student(probability: float, freedom: float) -> float:
    """The quantile of Student's t for a probability above ½ and any freedom of at least 1: with t = √ν·tan θ its
    density is that of cos^(ν−1) θ, which is summed up."""
    theta = np.linspace(0.0, np.pi / 2, 8001)
    density = np.cos(theta) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * probability - 1, area / area[-1], theta)))
