"""Orders that reverse inside the range, beyond it, and never; by laws and, where there are none, between rungs."""

import numpy as np
import pytest
from synthetic import from_means, law, points_of

from mai_thinking.experiments.scaling.analysis import analyse
from mai_thinking.experiments.scaling.crossings import SETTLED, Crossing
from mai_thinking.experiments.scaling.power_law import PowerLaw

BASELINE = law(1.0, 0.15, 1.0)


def crossing_of(other: PowerLaw, noise: float = 0.001) -> Crossing:
    points = points_of({"base": BASELINE, "other": other}, np.random.default_rng(0), noise=noise)
    (crossing,) = analyse(points, replicates=300).crossings
    return crossing


def true_crossing(other: PowerLaw, lowest: float = 1e13) -> float:
    grid = np.geomspace(lowest, 1e20, 200_001)
    return float(grid[np.argmax(other.loss(grid) < BASELINE.loss(grid))])


def test_inside() -> None:
    other = law(1.03, 0.19, 1.02)
    crossing = crossing_of(other)
    assert (crossing.status, crossing.method, crossing.better_below) == ("crosses inside", "laws", "base")
    assert crossing.low <= true_crossing(other) <= crossing.high  # type: ignore[operator]
    assert not crossing.same_at_every_rung
    assert (crossing.rungs[0].better, crossing.rungs[-1].better) == ("base", "other")
    assert crossing.settled_by is None


def test_beyond() -> None:
    other = law(1.10, 0.15, 0.97)
    crossing = crossing_of(other, noise=0.0003)
    assert (crossing.status, crossing.better_below) == ("crosses beyond", "base")
    assert crossing.at == pytest.approx(true_crossing(other), rel=1.0)
    assert crossing.low > 1e16  # type: ignore[operator]
    assert crossing.same_at_every_rung
    # The rung to run is past the crossing, and the curves are far enough apart there.
    assert crossing.settled_by > crossing.at  # type: ignore[operator]
    difference = np.log(BASELINE.loss(crossing.settled_by) / other.loss(crossing.settled_by))
    assert difference > 0.8 * SETTLED * 0.0003 * np.sqrt(2 / 3)
    assert crossing.settled_depth > 10  # type: ignore[operator]


def test_never() -> None:
    crossing = crossing_of(law(0.9, 0.15, 0.95))
    assert (crossing.status, crossing.at, crossing.settled_by) == ("no crossing", None, None)
    assert {rung.better for rung in crossing.rungs} == {"other"}


def test_noise_leaves_it_open() -> None:
    crossing = crossing_of(law(1.002, 0.15, 1.0), noise=0.01)
    assert crossing.status == "undecided"
    assert None in {rung.better for rung in crossing.rungs}


COSTS = np.geomspace(1e13, 1e16, 4)


def test_a_mix_that_gets_worse_again_is_followed_from_rung_to_rung() -> None:
    """Good early, exhausted later: no power law, but an order that plainly reverses between the second and third."""
    losses = {"diverse": [3.0, 2.6, 2.3, 2.1], "narrow": [2.8, 2.5, 2.4, 2.6]}
    (crossing,) = analyse(from_means(losses, 0.002, COSTS), replicates=200).crossings
    assert (crossing.method, crossing.status, crossing.better_below) == (
        "lines between rungs",
        "crosses inside",
        "narrow",
    )
    assert [rung.better for rung in crossing.rungs] == ["narrow", "narrow", "diverse", "diverse"]
    before, after = np.log(2.6 / 2.5), np.log(2.3 / 2.4)
    by_hand = np.exp(np.log(COSTS[1]) + before / (before - after) * np.log(COSTS[2] / COSTS[1]))
    assert crossing.at == pytest.approx(by_hand, rel=0.02)
    assert COSTS[1] < crossing.low < crossing.at < crossing.high < COSTS[2]  # type: ignore[operator]


def test_between_rungs_nothing_is_said_of_what_lies_beyond() -> None:
    losses = {"diverse": [3.0, 2.6, 2.3, 2.1], "narrow": [2.8, 2.5, 2.25, 2.4]}
    losses["narrow"][3] = 2.09
    losses["worse"] = [3.3, 3.1, 3.2, 3.5]
    crossings = analyse(from_means(losses, 0.0005, COSTS), replicates=200).crossings
    by_pair = {(c.first, c.second): c for c in crossings}
    worse = by_pair["diverse", "worse"]
    assert (worse.method, worse.status, worse.at) == ("lines between rungs", "none inside", None)
