"""Gains with known answers, what pairs are worth, and the verdict's rule."""

from dataclasses import replace

import numpy as np
import pytest
from simulation import Truth, simulate
from synthetic import law, points_of, times

from mai_thinking.experiments.scaling.analysis import Analysis, analyse
from mai_thinking.experiments.scaling.gain import Efficiency, Estimate, Gain, student
from mai_thinking.experiments.scaling.points import Point, PointSet

BASELINE = law(1.0, 0.15, 1.0)


def analysed(gain: float, seconds: dict[str, float] | None = None, noise: float = 0.001) -> Analysis:
    laws = {"base": BASELINE, "new": times(BASELINE, gain)}
    return analyse(points_of(laws, np.random.default_rng(0), noise=noise, seconds=seconds), replicates=300)


@pytest.mark.parametrize(("gain", "verdict"), [(1.5, "adopt"), (1 / 1.5, "reject")])
def test_a_gain_that_is_the_same_at_all_costs(gain: float, verdict: str) -> None:
    analysis = analysed(gain)
    e = analysis.gain("new")
    assert len(e.gains) == 5
    for at in e.gains:
        assert 0.99 * at.low < gain < 1.01 * at.high  # one of 20 intervals may miss
        assert at.value == pytest.approx(gain, rel=0.1)
    assert e.mean.low < gain < e.mean.high
    assert e.mean.high / e.mean.low < max(at.high / at.low for at in e.gains)
    assert e.trend.low < 1 < e.trend.high
    assert [at.beyond for at in e.gains] == [False] * 4 + [gain > 1]
    assert analysis.verdict("new") == verdict


def test_the_candidate_is_never_fitted() -> None:
    """Its losses may follow no law: at each rung the gain is what the baseline's law says of them."""
    costs = np.geomspace(1e13, 1e16, 5)
    gains = [1.3, 0.8, 1.1, 0.9, 1.2]
    points = [
        Point(config=name, seed=seed, flops=cost, loss={"loss": float(BASELINE.loss(cost * by))})
        for name, factors in (("base", [1.0] * 5), ("new", gains))
        for cost, by in zip(costs, factors, strict=True)
        for seed in (0, 1)
    ]
    found = analyse(PointSet(baseline="base", points=tuple(points)), replicates=50).gain("new")
    assert [at.value for at in found.gains] == pytest.approx(gains, rel=0.01)
    assert found.mean.value == pytest.approx(float(np.exp(np.log(gains).mean())), rel=0.01)


def correlated(gain: float, common: float, own: float, *, same_seeds: bool) -> PointSet:
    rng = np.random.default_rng(1)
    points = []
    for depth, cost in enumerate(np.geomspace(1e13, 1e15, 3), start=1):
        for seed in range(4):
            both = common * rng.standard_normal()
            for place, (name, at) in enumerate((("base", cost), ("new", cost * gain))):
                loss = float(BASELINE.loss(at) * np.exp(both + own * rng.standard_normal()))
                label = seed if same_seeds else seed + 10 * place
                points.append(Point(config=name, seed=label, flops=cost, loss={"loss": loss}, rung=depth))
    return PointSet(baseline="base", points=tuple(points))


def test_pairs_take_out_what_a_seed_does_to_both() -> None:
    pairs, apart = (
        analyse(correlated(1.1, 0.01, 0.0005, same_seeds=same), replicates=100).gain("new") for same in (True, False)
    )
    assert (pairs.paired, apart.paired) == (True, False)
    assert pairs.kept_variance == pytest.approx(0.0025, abs=0.003)
    assert pairs.verdict[0] == "adopt"
    assert pairs.mean.low < 1.1 < pairs.mean.high
    # The control: the same losses under other seeds, and the scatter is there again.
    assert apart.kept_variance is None
    assert apart.verdict[0] == "undecided"


def test_a_cost_that_differs_is_charged() -> None:
    """Equal losses, but the candidate's runs cost a third more."""
    points = correlated(1.0, 0.01, 0.0001, same_seeds=True)
    dearer = tuple(p.model_copy(update={"flops": p.flops * 4 / 3}) if p.config == "new" else p for p in points.points)
    found = analyse(points.model_copy(update={"points": dearer}), replicates=100).gain("new")
    assert found.mean.value == pytest.approx(0.75, rel=0.03)
    assert found.verdict[0] == "reject"


def test_time_is_judged_apart() -> None:
    """1.5 by FLOPs, but each FLOP takes twice as long: 0.75 by time, which is told beside the verdict."""
    analysis = analysed(1.5, {"base": 1.0, "new": 2.0})
    assert (analysis.verdict("new"), analysis.gain("new", "seconds").verdict[0]) == ("adopt", "reject")
    assert analysis.gain("new", "seconds").mean.value == pytest.approx(0.75, rel=0.05)


def told(mean: tuple[float, float], largest: tuple[float, float], *, falls: bool = False, rises: bool = False) -> str:
    ends = [Estimate(float(np.sqrt(low * high)), low, high) for low, high in (mean, largest)]
    own = Gain(1.0, *ends[1], pairs=3, spread=0.1, beyond=False)
    e = Efficiency("new", "loss", "flops", 0.03, None, (own,), *ends)
    return replace(e, falls=falls, rises=rises).verdict[0]


@pytest.mark.parametrize(
    ("mean", "largest", "trend", "verdict"),
    [
        ((1.05, 1.3), (0.99, 1.4), {}, "adopt"),
        ((1.05, 1.3), (0.99, 1.4), {"falls": True}, "undecided"),  # it may not hold up as cost grows
        ((1.05, 1.3), (1.01, 1.1), {"falls": True}, "adopt"),
        ((1.05, 1.3), (0.7, 1.2), {}, "undecided"),
        ((0.7, 0.95), (0.6, 1.1), {}, "reject"),
        ((0.7, 0.95), (0.9, 1.05), {"rises": True}, "undecided"),
        ((0.97, 1.02), (0.9, 1.1), {}, "reject"),  # a gain of 3 % is excluded
        ((0.97, 1.02), (0.9, 1.1), {"rises": True}, "undecided"),
        ((0.97, 1.04), (0.9, 1.1), {}, "undecided"),
        ((1.005, 1.02), (1.001, 1.1), {}, "adopt"),  # small, but there
    ],
)
def test_the_rule(
    mean: tuple[float, float], largest: tuple[float, float], trend: dict[str, bool], verdict: str
) -> None:
    assert told(mean, largest, **trend) == verdict


def test_without_a_law_or_scatter_nothing_is_decided() -> None:
    two_rungs = points_of({"base": BASELINE, "new": times(BASELINE, 3.0)}, np.random.default_rng(0), rungs=2)
    found = analyse(two_rungs, replicates=50).gain("new")
    assert found.verdict == ("undecided", "base: 2 rungs; a fit needs at least 3")


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [(0.975, 1, 12.706), (0.975, 4, 2.776), (0.95, 2.5, 2.558), (0.9, 30, 1.310)],
)
def test_students_quantiles(probability: float, freedom: float, quantile: float) -> None:
    """Tables; 2.5 degrees of freedom from an incomplete beta function."""
    assert student(probability, freedom) == pytest.approx(quantile, rel=1e-3)


NOISE = Truth(
    law=BASELINE,
    depths=[1, 2, 3],
    costs_R=np.geomspace(1e13, 1e15, 3),
    common_R=np.array([0.006, 0.01, 0.02]),
    own_R=np.array([0.0025, 0.006, 0.01]),
    seconds_R=np.array([1.0, 10.0, 100.0]),
)
"""Seeds and pairs as they scatter on our own ladders."""


@pytest.mark.parametrize("draws", [40, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_verdicts_on_ladders_of_known_truth(draws: int) -> None:
    """A few draws more than the promise may go wrong by chance among 40."""
    slack = 0.05 if draws < 1000 else 0.0
    seeds = NOISE.seeds(0.05)
    found = simulate(NOISE, seeds, draws, before=False)
    assert found["right"] >= 0.95 - slack
    assert found["undecided"] <= 0.3 + slack
    assert found["false_adopt"] <= 0.025 + slack
    few = simulate(NOISE, dict.fromkeys(seeds, 2), draws, before=False)
    assert few["undecided"] > 0.5  # the control: what the planner asks for is needed
    assert few["false_adopt"] <= 0.025 + slack
