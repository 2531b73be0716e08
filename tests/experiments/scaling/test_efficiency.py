"""Efficiency gains with known answers, and the verdict's rule."""

import numpy as np
import pytest
from synthetic import law, points_of, times

from mai_thinking.experiments.scaling.analysis import Analysis, analyse
from mai_thinking.experiments.scaling.efficiency import Efficiency, Gain, overall

BASELINE = law(1.0, 0.15, 1.0)


def analysed(gain: float, seconds: dict[str, float] | None = None, noise: float = 0.001) -> Analysis:
    laws = {"base": BASELINE, "new": times(BASELINE, gain)}
    return analyse(points_of(laws, np.random.default_rng(0), noise=noise, seconds=seconds), replicates=300)


@pytest.mark.parametrize(("gain", "verdict"), [(1.5, "adopt"), (1 / 1.5, "reject"), (1.0, "undecided")])
def test_a_gain_that_is_the_same_at_all_costs(gain: float, verdict: str) -> None:
    analysis = analysed(gain)
    (efficiency,) = analysis.efficiencies
    assert len(efficiency.gains) == 6  # five rungs and one beyond
    for at in efficiency.gains:
        margin = 0.5 * (at.high - at.low)  # one seed of many: a 95 % interval twice as wide
        assert at.low - margin <= gain <= at.high + margin
        assert at.low < at.value < at.high
    assert efficiency.gains[4].value == pytest.approx(gain, rel=0.1)
    assert efficiency.gains[4].measured == pytest.approx(gain, rel=0.1)
    assert efficiency.gains[5].cost == pytest.approx(1e16 * 10**0.75)
    assert (efficiency.gains[5].measured, efficiency.gains[5].beyond) == (None, True)
    assert analysis.verdict("new") == verdict


def test_time_and_flops_are_weighed_apart() -> None:
    """1.5 by FLOPs, but each FLOP takes twice as long: 0.75 by time."""
    analysis = analysed(1.5, {"base": 1.0, "new": 2.0})
    by_flops, by_time = analysis.gains("new", "loss")
    assert (by_flops.verdict[0], by_time.verdict[0]) == ("adopt", "reject")
    assert by_time.gains[4].value == pytest.approx(0.75, rel=0.1)
    assert analysis.verdict("new") == "undecided"
    assert analysed(1.5, {"base": 1.0, "new": 1.0}).verdict("new") == "adopt"


def test_more_than_the_baseline_can_ever_reach_is_infinite() -> None:
    laws = {"base": law(0.05, 0.3, 1.0), "new": law(0.05, 0.3, 0.9)}
    analysis = analyse(points_of(laws, np.random.default_rng(0), noise=0.0003), replicates=100)
    assert analysis.efficiencies[0].gains[-1].value == np.inf
    assert analysis.verdict("new") == "adopt"


def gains(*intervals: tuple[float, float]) -> Efficiency:
    at = tuple(Gain(1.0, (low + high) / 2, low, high, None, False) for low, high in intervals)
    return Efficiency("new", "loss", "flops", None, at)


@pytest.mark.parametrize(
    ("by_cost", "verdict"),
    [
        ([gains((0.5, 0.6), (1.1, 1.3), (1.05, 1.4))], "adopt"),  # what a small rung said does not count
        ([gains((1.1, 1.3), (0.9, 1.4))], "undecided"),  # it may not hold up as cost grows
        ([gains((0.7, 0.9), (0.6, 0.99))], "reject"),
        ([gains((0.7, 0.9), (0.6, 1.01))], "undecided"),
        ([gains((1.1, 1.3), (1.1, 1.4)), gains((0.9, 1.1), (0.9, 1.1))], "undecided"),
        ([gains((0.7, 0.9), (0.6, 0.8)), gains((0.9, 1.1), (0.9, 1.1))], "reject"),
        ([Efficiency("new", "loss", "flops", "base: 2 rungs")], "undecided"),
    ],
)
def test_the_rule(by_cost: list[Efficiency], verdict: str) -> None:
    assert overall(by_cost) == verdict
