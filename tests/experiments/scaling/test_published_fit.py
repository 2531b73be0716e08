"""Published fits from published points.

Hoffmann et al. (arXiv:2203.15556) trained at nine budgets. Besiroglu et al. (arXiv:2404.10102) read their points off
the paper's figure 4 (Besiroglu/data, `svg_extracted_data.csv`, no licence given). `chinchilla-2022.json` has of each
budget the lowest loss, at the mean cost of the runs that have it: nine numbers. Their fit, L = E + A·N^−α + B·D^−β, at
its optimal N and D for C = 6·N·D is E + K·C^−αβ/(α+β).

Gadre et al., "Language models scale reliably with over-training and on downstream tasks" (arXiv:2403.08540), publish
their runs (github.com/mlfoundations/scaling, `exp_data/models`): parameters N, tokens D and the loss on C4's validation
set for six sizes at D = 20·N, on RedPajama and on C4. `gadre-2024.json` has these, with C = 6·N·D as they count it.
Their law, E + (a·M^η + b·M^−η)·C^−η, is ours at a fixed M = D/N. Their notebook (`scaling_explorer.ipynb`) publishes
what their fit of RedPajama says of the 6.9B run, which it has not seen: 0.7320 % off. Neither it nor the code gives
intervals. Their procedure, from their points (10M to 411M at M = 20, and 10M at M = 320), comes to exactly that number
with η = 0.1364, E = 1.837.
"""

from pathlib import Path

import numpy as np
import pytest

from mai_thinking.experiments.scaling.baseline import BaselineFit, Curve, fit_baseline, interval, seed_noise
from mai_thinking.experiments.scaling.points import read_points

LARGEST, MEASURED = 6.0 * 6889410560 * 137788211200, 2.424993099368689
PUBLISHED_ERROR = 0.007320
THEIR_ETA, THEIR_E = 0.1364, 1.837


@pytest.fixture(scope="module")
def without_the_largest() -> BaselineFit:
    whole = Curve.of(read_points(Path(__file__).with_name("gadre-2024.json"), None), "redpajama", "loss", "flops")
    assert whole.costs_R[-1] == pytest.approx(LARGEST)
    assert whole.losses[-1] == pytest.approx(MEASURED)
    curve = Curve("redpajama", "loss", "flops", whole.costs_R[:5], whole.losses[:5])
    return fit_baseline(curve, seed_noise([curve]), np.random.default_rng(0))


def test_it_predicts_what_the_published_fit_predicts(without_the_largest: BaselineFit) -> None:
    """Five sizes up to 1.4B, to 23 times their cost: theirs and the measured loss are both in the interval, and the
    prediction itself is closer to theirs than theirs is to the truth."""
    assert without_the_largest.problem is None
    theirs = MEASURED * (1 + PUBLISHED_ERROR)
    ours = float(without_the_largest.law.loss(LARGEST))
    assert ours == pytest.approx(theirs, rel=0.001)
    low, high = interval(without_the_largest.replicates.loss(LARGEST))
    assert low < MEASURED < theirs < high
    assert (high - low) / ours < 0.15


def test_its_parameters_are_the_published_fits(without_the_largest: BaselineFit) -> None:
    law, many = without_the_largest.law, without_the_largest.replicates
    assert float(law.alpha) == pytest.approx(THEIR_ETA, rel=0.03)
    assert float(law.floor) == pytest.approx(THEIR_E, rel=0.03)
    for values, theirs in ((many.alpha, THEIR_ETA), (many.floor, THEIR_E)):
        low, high = interval(values)
        assert low < theirs < high


THEIR_FIT = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)
"""E, A, B, α, β of Besiroglu et al., table 1."""


def test_chinchillas_frontier_is_the_one_that_its_fit_has() -> None:
    """From the best of each budget, E, the exponent, and the loss at Chinchilla's own 5.76e23 FLOPs, 200 times on."""
    curve = Curve.of(read_points(Path(__file__).with_name("chinchilla-2022.json"), None), "chinchilla", "loss", "flops")
    found = fit_baseline(curve, seed_noise([curve]), np.random.default_rng(0))
    e, a, b, alpha, beta = THEIR_FIT
    n = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (5.76e23 / 6) ** (beta / (alpha + beta))
    there = e + a * n**-alpha + b * (5.76e23 / 6 / n) ** -beta
    assert there == pytest.approx(1.974, abs=0.001)
    many = found.replicates
    for values, theirs, width in (
        (many.floor, e, 0.2),
        (many.alpha, alpha * beta / (alpha + beta), 0.05),
        (many.loss(5.76e23), there, 0.1),
    ):
        low, high = interval(values)
        assert low < theirs < high
        assert high - low < width
