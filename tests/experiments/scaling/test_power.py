"""A plan decides what it says it does, in the time that it says."""

import numpy as np
import pytest
from simulation import Truth, verdict
from synthetic import law

from mai_thinking.experiments.scaling.analysis import analyse
from mai_thinking.experiments.scaling.power import MOST_PAIRS, Pilot, pilots, propose

RUNGS = [Pilot(2, 1e10, 2.0, 0.05, 20), Pilot(4, 1e11, 10.0, 0.08, 20), Pilot(6, 1e12, 60.0, 0.1, 20)]
TRUTH = Truth(
    law=law(1.0, 0.15, 1.0),
    depths=[1, 2, 3],
    costs_R=np.geomspace(1e13, 1e15, 3),
    common_R=np.array([0.006, 0.01, 0.02]),
    own_R=np.array([0.0025, 0.004, 0.006]),
    seconds_R=np.array([1.0, 10.0, 100.0]),
)


def test_more_time_decides_less() -> None:
    plans = [propose(RUNGS, minutes * 60, 0.03)[1] for minutes in (30, 60, 240)]
    assert all(plan is not None and plan.seconds <= m * 60 for plan, m in zip(plans, (30, 60, 240), strict=True))
    least = [plan.least for plan in plans if plan is not None]
    assert least == sorted(least, reverse=True)
    # Four times the pairs halve the error.
    assert least[2] == pytest.approx(least[1] / 2, rel=0.2)


def test_it_says_that_it_cannot() -> None:
    assert propose(RUNGS, 600, 0.03) == (None, propose(RUNGS, 600, 0.5)[1])
    assert propose(RUNGS, 60, 0.03) == (None, None)  # three pairs of each rung take 216 s
    assert propose(RUNGS[:2], 1e9, 0.03) == (None, None)
    noisy = [Pilot(r.rung, r.cost, r.seconds, 100 * r.spread, 20) for r in RUNGS]
    plan = propose(noisy, 1e9, 0.03)[1]
    assert plan is not None
    assert max(plan.seeds.values()) <= MOST_PAIRS


def test_it_reaches_to_the_largest_rung_that_can_be_paid_for() -> None:
    dear = [*RUNGS, Pilot(8, 1e13, 1e5, 0.1, 20)]
    plan, _ = propose(dear, 3600, 0.1)
    assert plan is not None
    assert set(plan.seeds) == {2, 4, 6}
    far, _ = propose(dear, 1e7, 0.1)
    assert far is not None
    assert 8 in far.seeds


def test_pilots_are_read_off_the_points() -> None:
    points = TRUTH.draw(1.0, {1: 30, 2: 30, 3: 30}, np.random.default_rng(0))
    timed = tuple(p.model_copy(update={"wall": 7.0}) for p in points.points)
    points = points.model_copy(update={"points": timed})
    found = pilots(points, analyse(points, replicates=50))
    assert [p.rung for p in found] == [1, 2, 3]
    assert [p.seconds for p in found] == [14.0] * 3
    slopes = np.log(TRUTH.law.loss(TRUTH.costs_R) / TRUTH.law.loss(TRUTH.costs_R * 1.01)) / np.log(1.01)
    assert [p.spread for p in found] == pytest.approx((TRUTH.own_R / slopes).tolist(), rel=0.4)


@pytest.mark.parametrize("draws", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_a_plan_has_the_power_that_it_promises(draws: int) -> None:
    """A tenth may stay undecided, and of 60 draws another tenth by chance."""
    rng = np.random.default_rng(5)
    seeds = TRUTH.seeds(0.05)
    said = [verdict(TRUTH.draw(1.05, seeds, rng), rng) for _ in range(draws)]
    assert said.count("adopt") >= (0.78 if draws < 500 else 0.85) * draws
    half = {rung: max(2, n // 3) for rung, n in seeds.items()}
    fewer = [verdict(TRUTH.draw(1.05, half, rng), rng) for _ in range(draws)]
    assert fewer.count("adopt") < 0.7 * draws
