"""Orders that reverse between the rungs, and orders that do not."""

import numpy as np
import pytest
from synthetic import from_means, law, points_of

from mai_thinking.experiments.scaling.analysis import analyse
from mai_thinking.experiments.scaling.crossings import Crossing
from mai_thinking.experiments.scaling.power_law import PowerLaw

BASELINE = law(1.0, 0.15, 1.0)
COSTS = np.geomspace(1e13, 1e16, 4)


def crossing_of(other: PowerLaw, noise: float = 0.001) -> Crossing:
    points = points_of({"base": BASELINE, "other": other}, np.random.default_rng(0), noise=noise)
    (crossing,) = analyse(points, replicates=300).crossings
    return crossing


def test_two_laws_that_cross() -> None:
    other = law(1.03, 0.19, 1.02)
    crossing = crossing_of(other)
    grid = np.geomspace(1e13, 1e16, 100_001)
    truth = float(grid[np.argmax(other.loss(grid) < BASELINE.loss(grid))])
    assert crossing.status == "crosses"
    assert crossing.low <= truth <= crossing.high  # type: ignore[operator]
    assert (crossing.better[0], crossing.better[-1]) == ("base", "other")


def test_never() -> None:
    crossing = crossing_of(law(0.9, 0.15, 0.95))
    assert (crossing.status, crossing.at) == ("no crossing", None)
    assert set(crossing.better) == {"other"}


def test_noise_leaves_it_open() -> None:
    crossing = crossing_of(law(1.002, 0.15, 1.0), noise=0.01)
    assert crossing.status == "undecided"
    assert None in crossing.better


def test_a_mix_that_gets_worse_again_is_followed_from_rung_to_rung() -> None:
    """Good early, exhausted later: no power law, but an order that plainly reverses between the second and third."""
    losses = {"diverse": [3.0, 2.6, 2.3, 2.1], "narrow": [2.8, 2.5, 2.4, 2.6]}
    (crossing,) = analyse(from_means(losses, 0.002, COSTS), replicates=200).crossings
    assert crossing.status == "crosses"
    assert crossing.better == ("narrow", "narrow", "diverse", "diverse")
    assert COSTS[1] < crossing.low < crossing.at < crossing.high < COSTS[2]  # type: ignore[operator]


@pytest.mark.parametrize("last", [2.1005, 2.6])
def test_the_cheap_rungs_do_not_make_a_verdict(last: float) -> None:
    """Better at three rungs; at the largest just behind, or far: adopted in neither case."""
    losses = {"diverse": [3.0, 2.6, 2.3, 2.1], "narrow": [2.8, 2.5, 2.25, last]}
    assert analyse(from_means(losses, 0.0005, COSTS), replicates=100).verdict("narrow") != "adopt"
