"""The collector's rule on a virtual clock."""

from pathlib import Path

import pytest

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.experiments.pacing import MeasuredGroup, Simulated, simulate

ROOT = Path(__file__).parents[2]
PROBLEMS = [MeasuredGroup(n, 10 + 7 * (n % 13) + (200 if n % 5 == 0 else 0), 0.0, n % 3 > 0) for n in range(60)]


def run(way: str, max_staleness: int, learn_seconds: float) -> Simulated:
    config = load_config(GrpoConfig, ROOT / "configs" / "tiny-grpo.yaml", [])
    return simulate(
        PROBLEMS, way, slots=32, per_update=16, learn_seconds=learn_seconds, token_seconds=0.02, config=config,
        max_staleness=max_staleness, updates=80,
    )  # fmt: skip


@pytest.mark.parametrize("max_staleness", [2, 8])
def test_a_fast_learner_waits_less_when_workers_go_on(max_staleness: int) -> None:
    waits = {way: run(way, max_staleness, 1.0).waits for way in ("synchronous", "dropping", "pacing")}
    assert waits["synchronous"] > 0.6
    assert max(waits["dropping"], waits["pacing"]) < waits["synchronous"] - 0.2


def test_pacing_does_not_starve_long_responses_where_dropping_does() -> None:
    """Neither lets the learner wait."""
    dropping, pacing, synchronous = (run(way, 2, 3.0) for way in ("dropping", "pacing", "synchronous"))
    assert min(synchronous.learned) == 1
    assert dropping.learned[0] < dropping.learned[2] - 0.2
    assert pacing.learned[2] - pacing.learned[0] < (dropping.learned[2] - dropping.learned[0]) / 2
    assert min(pacing.learned) > 0.85
    assert max(pacing.waits, dropping.waits) < 0.05 < synchronous.waits
