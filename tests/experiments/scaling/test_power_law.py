"""The fit against exact data, against a search without gradients, and with a run gone wrong."""

import itertools

import numpy as np
import pytest
from synthetic import law

from mai_thinking.experiments.scaling.power_law import fit, refit

COSTS = np.repeat(np.geomspace(1e13, 1e16, 5), 3)


@pytest.mark.parametrize("truth", [(1.0, 0.15, 1.0), (3.0, 0.05, 0.3), (0.2, 0.5, 2.5), (1.0, 0.1, 1e-3)])
def test_exact_points_give_their_law_back(truth: tuple[float, float, float]) -> None:
    one = law(*truth)
    found = fit(COSTS, one.loss(COSTS))
    assert float(found.A) == pytest.approx(float(one.A), rel=0.02)
    assert float(found.alpha) == pytest.approx(truth[1], rel=1e-3)
    assert float(found.floor) == pytest.approx(truth[2], rel=1e-3, abs=2e-3)
    np.testing.assert_allclose(found.cost(found.loss(COSTS)), COSTS, rtol=1e-9)
    assert found.cost(float(found.floor)) == np.inf


def test_no_point_of_a_grid_is_better() -> None:
    """Least squares in log loss, which Huber's loss is within its width; every α and E, with the best A for both."""
    rng = np.random.default_rng(0)
    losses = law(1.0, 0.15, 1.0).loss(COSTS) * np.exp(0.003 * np.clip(rng.standard_normal(15), -1.2, 1.2))
    found = fit(COSTS, losses)

    def squares(logs: np.ndarray) -> float:
        return float(((np.log(losses) - logs) ** 2).sum())

    reached = squares(np.log(found.loss(COSTS)))
    alphas = float(found.alpha) * np.linspace(0.8, 1.2, 41)
    floors = float(found.floor) * np.linspace(0.8, 1.2, 41)
    scales = float(found.log_scale) + np.linspace(-0.2, 0.2, 81)
    x = np.log(COSTS / found.reference)
    best = min(
        squares(np.log(np.exp(scale - alpha * x) + floor))
        for alpha, floor, scale in itertools.product(alphas, floors, scales)
    )
    assert reached <= best * (1 + 1e-6)


def test_one_run_gone_wrong_hardly_matters() -> None:
    rng = np.random.default_rng(1)
    losses = law(1.0, 0.15, 1.0).loss(COSTS) * np.exp(0.002 * rng.standard_normal(15))
    before = fit(COSTS, losses)
    losses[14] *= 1.2  # the largest rung, a hundred times the scatter
    after = fit(COSTS, losses)
    assert abs(np.log(after.loss(1e16) / before.loss(1e16))) < 0.003


def test_refits_are_the_fits_of_each_row() -> None:
    rng = np.random.default_rng(2)
    one = fit(COSTS, law(1.0, 0.15, 1.0).loss(COSTS))
    rows = one.loss(COSTS) * np.exp(0.003 * rng.standard_normal((20, 15)))
    together = refit(one, COSTS, rows, 0.003)
    alone = [fit(COSTS, row) for row in rows]
    for index, single in enumerate(alone):  # their Huber widths differ a little
        assert float(together[index].loss(1e16)) == pytest.approx(float(single.loss(1e16)), rel=2e-3)


def test_a_wild_row_leaves_the_others_alone() -> None:
    one = fit(COSTS, law(1.0, 0.15, 1.0).loss(COSTS))
    rows = np.tile(one.loss(COSTS), (3, 1))
    rows[1, ::2] *= 1e-30
    found = refit(one, COSTS, rows, 0.003)
    for index in (0, 2):
        np.testing.assert_allclose(found[index].loss(COSTS), one.loss(COSTS), rtol=1e-4)
