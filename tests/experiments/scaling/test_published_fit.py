"""A published fit from published points.

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
