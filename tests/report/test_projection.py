"""The event simulation against arithmetic, against the closed form where that holds, and against a run by hand."""

import itertools
import math
import random

import pytest

from mai_thinking.report.projection import (
    Costs,
    expected,
    once_a_period,
    poisson,
    projection,
    simulate,
    young_interval,
)

COSTS = Costs(ideal_step=0.9, step=1.0, evaluation=0.0, stall=2.0, commit=0.0, restart=30.0, rescued=0.0, start_up=0.0)
NEVER = (float("inf"),)


def test_without_faults_only_saves_and_slow_steps_cost() -> None:
    costs = COSTS._replace(start_up=10.0)
    assert simulate(costs, 10, itertools.chain(NEVER), 100) == pytest.approx(100 * 0.9 / (10 + 100 + 10 * 2))


def test_a_fault_costs_the_steps_since_the_last_commit_and_a_restart() -> None:
    """Steps of 1 s, saves of 2 s after each 10: at 35 s two cycles (24 s) are done, and 30 + 80 + 8·2 s follow."""
    wall = 35 + 30 + 80 + 8 * 2
    assert simulate(COSTS, 10, iter([35.0, *NEVER]), 100) == pytest.approx(90 / wall)
    # The second save ended at 24 s; if it takes 12 s more to be committed, only the first one counts.
    late = COSTS._replace(commit=12.0)
    assert simulate(late, 10, iter([35.0, *NEVER]), 100) == pytest.approx(90 / (35 + 30 + 90 + 9 * 2))


def test_a_rescued_fault_costs_a_restart_and_the_step_under_way() -> None:
    """At 33.5 s two cycles of 12 s and nine whole steps are done."""
    rescued = COSTS._replace(rescued=1.0)
    assert simulate(rescued, 10, iter([33.5, *NEVER]), 100) == pytest.approx(90 / (33.5 + 30 + 71 + 8 * 2))
    # During a save all steps before it are there, committed or not.
    assert simulate(rescued, 10, iter([35.0, *NEVER]), 100) == pytest.approx(90 / (35 + 30 + 70 + 7 * 2))
    # Of two faults the first is rescued and leaves 71 steps; the second, 15 s later, throws it back to 61.
    half = COSTS._replace(rescued=0.5)
    wall = 33.5 + 30 + 15 + 30 + 61 + 7 * 2
    assert simulate(half, 10, iter([33.5, 33.5 + 30 + 15, *NEVER]), 100) == pytest.approx(90 / wall)


def test_a_fault_while_restarting_starts_the_restart_again() -> None:
    wall = 35 + 10 + 30 + 80 + 8 * 2
    assert simulate(COSTS, 10, iter([35.0, 45.0, *NEVER]), 100) == pytest.approx(90 / wall)


def daly(costs: Costs, every: int, rate: float) -> float:
    """J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" (FGCS 2006): the
    expected wall-clock of a cycle, as a goodput; commits take no time."""
    between_faults = 1 / rate
    cycle = every * costs.cadence + costs.stall
    wall = between_faults * math.exp(costs.restart / between_faults) * math.expm1(cycle / between_faults)
    return every * (costs.ideal_step + costs.evaluation) / wall


@pytest.mark.parametrize("between_faults", [2_000.0, 20_000.0])
def test_it_agrees_with_daly(between_faults: float) -> None:
    every = round(young_interval(COSTS, 1 / between_faults))
    assert expected(COSTS, every, 1 / between_faults) == pytest.approx(daly(COSTS, every, 1 / between_faults), abs=0.01)


def test_youngs_interval_is_near_the_best() -> None:
    rate = 1 / 20_000
    every = round(young_interval(COSTS, rate) / COSTS.cadence)
    for other in (every // 8, every * 8):
        assert expected(COSTS, other, rate) < expected(COSTS, every, rate)


def test_faults_come_as_often_as_said() -> None:
    times = list(itertools.islice(poisson(0.1, random.Random(0)), 5000))
    assert times[-1] / 5000 == pytest.approx(10, rel=0.05)
    for number, time in enumerate(itertools.islice(once_a_period(60, random.Random(0)), 100)):
        assert number * 60 <= time < (number + 1) * 60


def test_more_gpus_are_worse() -> None:
    rows = projection(COSTS._replace(restart=300.0), 100, 2e-5)
    assert [row[0] for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert rows[0][4] > rows[-1][4] + 1
