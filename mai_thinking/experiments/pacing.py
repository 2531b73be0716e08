"""Pacing (MAI-Thinking-1 report §3.6): what it does in runs that were made, and the collector's own rule simulated on
a virtual clock with the lengths of such a run.

Three ways to have rollouts for a learner: *synchronous*, generate and then learn; *dropping*, generate without a pause
and throw away what has become too old; *pacing*, begin only what can be learned from in time.
"""

import bisect
import heapq
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.rl.asynchronous import Ahead
from mai_thinking.rl.collector import Collector
from mai_thinking.rl.rollout import Group
from mai_thinking.rl.rollout_worker import RolloutBatch, RolloutWorker
from mai_thinking.rl.schedule import Schedule, schedule_path
from mai_thinking.rl.tasks import TaskSampler
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.rl.worker_pool import WorkerPool

WAYS = ("synchronous", "dropping", "pacing")
_COLUMNS = ["group_id", "verdict", "response_ids"]


class MeasuredGroup(NamedTuple):
    """A group of a run that was made."""

    number: int
    longest: int
    """Tokens of its longest response: what the group takes."""
    mean: float
    kept: bool


def measured_problems(run: Path) -> list[MeasuredGroup]:
    """Of the later half of a run's traces."""
    rows = TraceStore(run / "traces").read(columns=["step", *_COLUMNS])
    return _problems(rows.filter(pc.field("step") >= pc.max(rows["step"]).as_py() / 2))


def seconds_of_a_token(run: Path) -> float:
    """Of a run with workers: a batch takes as many steps as its longest response has tokens."""
    arrivals = Schedule(schedule_path(run, 0)).arrivals
    steps = sum(max(one.longest for one in _batch(run, arrival["arrived"])) for arrival in arrivals)
    return float(sum(arrival["seconds"] for arrival in arrivals) / steps)


def shares_by_size(run: Path, config: GrpoConfig, max_staleness: int) -> list[dict[str, Any]]:
    """What became of the groups worth learning from of a run with workers, by the size of their problems: how many
    there were, the mean length of their responses, and the share that was learned from. By the run's schedule, as the
    buffer goes; what still waited at the end is not counted."""
    mix = TaskSampler(config.tasks, config.seed)
    per_update = config.groups_per_step * config.rollouts.steps_per_update
    arrivals = Schedule(schedule_path(run, 0)).arrivals
    buffer: list[tuple[MeasuredGroup, int]] = []
    decided: dict[int, tuple[MeasuredGroup, bool]] = {}
    for version in range(arrivals[-1]["version"] + 1):
        for arrival in arrivals:
            if arrival["version"] == version:
                kept = [one for one in _batch(run, arrival["arrived"]) if one.kept]
                buffer += [(one, arrival["weights"][0][1]) for one in kept]
        decided |= {one.number: (one, False) for one, wrote in buffer if wrote < version - max_staleness}
        buffer = [(one, wrote) for one, wrote in buffer if one.number not in decided]
        decided |= {one.number: (one, True) for one, _ in buffer[:per_update]}
        buffer = buffer[per_update:]
    by_size: dict[int, list[tuple[MeasuredGroup, bool]]] = {}
    for one, learned in decided.values():
        by_size.setdefault(mix.problem("train", one.number).size, []).append((one, learned))
    return [
        {
            "size": size,
            "groups": len(groups),
            "response_length": fmean(one.mean for one, _ in groups),
            "learned": fmean(learned for _, learned in groups),
        }
        for size, groups in sorted(by_size.items())
    ]


def _batch(run: Path, number: int) -> list[MeasuredGroup]:
    return _problems(parquet.read_table(run / FOLDER / f"batch-{number:08d}-rank-00000.parquet", columns=_COLUMNS))


def _problems(rows: pa.Table) -> list[MeasuredGroup]:
    """In the order in which they come."""
    rows = rows.append_column("length", pc.list_value_length(rows["response_ids"]))
    groups = rows.group_by("group_id", use_threads=False)
    columns = groups.aggregate([("length", "max"), ("length", "mean"), ("verdict", "max")]).to_pydict()
    names = ("group_id", "length_max", "length_mean", "verdict_max")
    found = zip(*(columns[name] for name in names), strict=True)
    return [MeasuredGroup(number, longest, mean, verdict == "kept") for number, longest, mean, verdict in found]


# --------------------------------------------------------------------------------------------------------- simulated


class Simulated(NamedTuple):
    """What became of so many updates."""

    waits: float
    """Share of the time that the learner waits."""
    learned: list[float]
    """Of the groups worth learning from that were generated, the share that was learned from: of the longest third, the
    middle one, the shortest."""


def simulate(
    problems: Sequence[MeasuredGroup], way: str, *, slots: int, per_update: int, learn_seconds: float,
    token_seconds: float, max_staleness: int, updates: int, config: GrpoConfig,
) -> Simulated:  # fmt: skip
    """`slots` problems are generated at once, all workers together; a token of each takes `token_seconds`, an update of
    `per_update` groups `learn_seconds`."""
    rollouts = config.rollouts.model_copy(update={"max_staleness": max_staleness, "steps_per_update": 1})
    config = config.model_copy(update={"rollouts": rollouts, "groups_per_step": per_update})
    pool = _VirtualPool(problems, token_seconds, slots)
    nobody = cast(
        RolloutWorker,
        SimpleNamespace(config=config, problems=1, ranks=1, engine=SimpleNamespace(heartbeat=lambda: None)),
    )
    traces = cast(TraceStore, SimpleNamespace(append=lambda number, rows: None))
    kind = _Dropping if way == "dropping" else Ahead
    collector = kind(nobody, traces, cast(WorkerPool, pool), Schedule(Path(os.devnull)), rank=0)
    collector.patience = updates * slots  # a batch is one problem here
    waited, learned = 0.0, set[int]()
    for version in range(updates):
        pool.published.append(pool.now)
        begin = pool.now
        while len(collector.buffer) < per_update:
            if way == "synchronous":
                _one_round(collector, pool)
            else:
                collector.fill(
                    per_update, version=version, max_length=1, penalise_length=True, hopeless=lambda counts: False
                )
            collector.drop_stale(version - max_staleness)
        waited += pool.now - begin
        learned |= {group.number for group in collector.take(per_update)}
        pool.now += learn_seconds
    worth = [batch for batch in pool.finished() if pool.problem(batch).kept]
    worth.sort(key=lambda batch: -pool.problem(batch).longest)
    thirds = [worth[len(worth) * i // 3 : len(worth) * (i + 1) // 3] for i in range(3)]
    shares = [sum(batch.first in learned for batch in third) / max(1, len(third)) for third in thirds]
    return Simulated(waited / pool.now, shares)


class _VirtualPool:
    """What `Ahead` asks of a `WorkerPool`; nothing runs. A batch beyond the slots begins when one is free."""

    def __init__(self, problems: Sequence[MeasuredGroup], token_seconds: float, slots: int) -> None:
        self.problems, self.token_seconds = problems, token_seconds
        self.slots = self.count = slots
        self.now = 0.0
        self.published: list[float] = []
        """When each version was."""
        self._begun: dict[RolloutBatch, tuple[float, float]] = {}
        self._free = [0.0] * slots
        self._ends: list[float] = []

    def problem(self, batch: RolloutBatch) -> MeasuredGroup:
        """What a batch is about: any of them, but always the same."""
        return self.problems[random.Random(batch.first).randrange(len(self.problems))]

    def begin(self, batch: RolloutBatch) -> float:
        """→ when it will end."""
        start = max(self.now, heapq.heappop(self._free))
        end = start + self.problem(batch).longest * self.token_seconds
        self._begun[batch] = start, end
        heapq.heappush(self._free, end)
        heapq.heappush(self._ends, end)
        return end

    def take(self, batch: RolloutBatch) -> RolloutBatch | None:
        start, end = self._begun[batch]
        if end > self.now:
            return None
        version = bisect.bisect_right(self.published, start) - 1
        groups = [Group(batch.first, version)] if self.problem(batch).kept else []
        return replace(batch, version=version, groups=groups)

    def withdraw(self) -> None:
        """The learner answers none itself: it is another machine."""

    def poll(self) -> None:
        """Nothing comes by itself."""

    def wait(self, heartbeat: Any) -> None:
        """Until the next one is done."""
        while self._ends and self._ends[0] <= self.now:
            heapq.heappop(self._ends)
        self.now = self._ends[0]

    def discard(self, number: int) -> None:
        """Nothing is stored."""

    def finished(self) -> list[RolloutBatch]:
        """All that are done, but for the last few, which nobody could have learned from yet."""
        done = sorted((end, batch.number, batch) for batch, (_, end) in self._begun.items() if end <= self.now)
        return [batch for _, _, batch in done[: -4 * self.slots]]


class _Dropping(Ahead):
    """All slots are in use all the time."""

    def in_time(self, groups: float) -> bool:
        return True


def _one_round(collector: Collector, pool: _VirtualPool) -> None:
    """Fill all slots together, and empty them to the last."""
    batches = [collector.draw() for _ in range(pool.slots)]
    pool.now = max(pool.begin(batch) for batch in batches)
    collector.under_way.clear()
    collector.buffer.extend(group for batch in batches if (done := pool.take(batch)) for group in done.groups)
