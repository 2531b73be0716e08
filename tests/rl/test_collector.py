"""The collector's loop alone, with batches made by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.rl.collector import Collector
from mai_thinking.rl.metrics import stale_metrics
from mai_thinking.rl.rollout import Group
from mai_thinking.rl.rollout_worker import RolloutBatch

ROOT = Path(__file__).parents[2]


class ByHand(Collector):
    """Has batches of groups of these versions."""

    batches: list[list[int]]

    def next(self, wanted: int) -> RolloutBatch | None:
        if not wanted:
            return None
        batch = self.draw()
        groups = [Group(batch.first, version, "kept") for version in self.batches.pop(0)]
        return replace(batch, groups=groups)


def test_what_is_too_old_is_not_learned_from() -> None:
    config = load_config(GrpoConfig, ROOT / "configs" / "tiny-grpo.yaml", ["rollouts.max_staleness=1"])
    engine = SimpleNamespace(heartbeat=lambda: None)
    worker: Any = SimpleNamespace(config=config, problems=4, ranks=1, engine=engine)
    traces: Any = SimpleNamespace(append=lambda number, rows: None)
    collector = ByHand(worker, traces, rank=0)
    collector.batches = [[1, 2, 1], [0], [3], [3]]
    stale, _ = collector.fill(2, version=3, max_length=8, penalise_length=True, hopeless=lambda counts: False)
    assert [group.version for group in stale] == [1, 1, 0]
    assert len(collector.batches) == 1
    assert [group.version for group in collector.take(2)] == [2, 3]


def test_what_is_dropped_is_told_with_its_difficulty_and_length() -> None:
    context: Any = SimpleNamespace(sum=lambda values: dict(values))

    def rollout(tokens: int, passed: bool) -> Any:
        return SimpleNamespace(response_ids=[1] * tokens, grade=SimpleNamespace(passed=passed))

    hard = Group(0, 0, "kept", cast(Any, [rollout(30, False), rollout(20, False), rollout(10, True)]))
    easy = Group(1, 0, "kept", cast(Any, [rollout(4, True)]))
    assert stale_metrics([], context) == {"groups_stale": 0}
    assert stale_metrics([hard, easy], context) == {
        "groups_stale": 2,
        "pass_rate/stale": pytest.approx(2 / 3),
        "response_length/stale": 16,
    }
