"""The controller alone, with batches made by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.rl.controller import Controller, Executor
from mai_thinking.rl.metrics import stale_metrics
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.rollout import Group, Verdict
from mai_thinking.rl.rollout_worker import Batch

ROOT = Path(__file__).parents[2]


class ByHand(Executor):
    """Has batches of groups of these versions."""

    def __init__(self, *batches: list[int]) -> None:
        self.batches = list(batches)

    def next(self, controller: Controller, wanted: int) -> Batch | None:
        if not wanted:
            return None
        order = controller.draw()
        groups = [Group(order.first, version, Verdict.KEPT) for version in self.batches.pop(0)]
        return Batch(order, min((group.version for group in groups), default=0), groups, FilterCounts(), [])


def test_what_is_too_old_on_arrival_is_not_learned_from() -> None:
    config = load_config(GrpoConfig, ROOT / "configs" / "tiny-grpo.yaml", ["rollouts.max_staleness=1"])
    traces: Any = SimpleNamespace(append=lambda number, rows: None)
    executor = ByHand([1, 2, 1], [0], [3], [3])
    controller = Controller(config, executor, traces, problems=4, rank=0, ranks=1)
    groups, stale, _ = controller.collect(
        2, version=3, buffered=0, max_length=8, penalise_length=True, heartbeat=lambda: None,
        hopeless=lambda counts: False,
    )  # fmt: skip
    assert [group.version for group in groups] == [2, 3]
    assert [group.version for group in stale] == [1, 1, 0]
    assert len(executor.batches) == 1


def test_what_is_dropped_is_told_with_its_difficulty_and_length() -> None:
    context: Any = SimpleNamespace(sum=lambda values: dict(values))

    def rollout(tokens: int, passed: bool) -> Any:
        return SimpleNamespace(response_ids=[1] * tokens, grade=SimpleNamespace(passed=passed))

    hard = Group(0, 0, Verdict.KEPT, cast(Any, [rollout(30, False), rollout(20, False), rollout(10, True)]))
    easy = Group(1, 0, Verdict.KEPT, cast(Any, [rollout(4, True)]))
    assert stale_metrics([], context) == {"groups_stale": 0}
    assert stale_metrics([hard, easy], context) == {
        "groups_stale": 2,
        "pass_rate/stale": pytest.approx(2 / 3),
        "response_length/stale": 16,
    }
