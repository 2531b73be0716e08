"""Pacing simulated (MAI-Thinking-1 report §3.6): the controller's own rule on a virtual clock, with the lengths of a
run that was made.

Three ways to have rollouts for a learner: *synchronous*, generate and then learn; *dropping*, generate without a pause
and throw away what has become too old; *pacing*, begin only what can be learned from in time.
"""

import bisect
import heapq
import os
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, cast

from pyarrow import parquet

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.rl.controller import Controller, Executor
from mai_thinking.rl.executors import Ahead
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.rollout import Group
from mai_thinking.rl.rollout_worker import Batch, Order, RolloutWorker
from mai_thinking.rl.schedule import Schedule, schedule_path
from mai_thinking.rl.tasks import TaskSampler
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.rl.worker_pool import WorkerPool
from mai_thinking.training.metrics import read_records

WAYS = ("synchronous", "dropping", "pacing")


class Measured(NamedTuple):
    """A problem of a run."""

    longest: int
    """Tokens of its longest response: what its group takes."""
    kept: bool


class Simulated(NamedTuple):
    """What became of so many updates."""

    waits: float
    """Share of the time that the learner waits."""
    learned: list[float]
    """Of the groups worth learning from that were generated, the share that was learned from: of the longest third, the
    middle one, the shortest."""


def measured_problems(run: Path) -> list[Measured]:
    """Of the later half of a run's traces."""
    store = TraceStore(run / "traces")
    rows = store.read(columns=["step", "group_id", "response_ids", "verdict"])
    columns = {name: rows[name].to_pylist() for name in ("step", "group_id", "verdict")}
    lengths = rows["response_ids"].combine_chunks().value_lengths().to_pylist()
    half = max(columns["step"]) / 2
    found: dict[int, Measured] = {}
    for step, group, verdict, length in zip(*columns.values(), lengths, strict=True):
        if step >= half:
            longest = max(length, found[group].longest if group in found else 0)
            found[group] = Measured(longest, verdict == "kept")
    return list(found.values())


def seconds_of_a_token(run: Path) -> float:
    """Of a run with workers: a batch takes as many steps as its longest response has tokens."""
    arrived = [r for r in read_records(schedule_path(run, 0)) if "arrived" in r]
    return sum(r["seconds"] for r in arrived) / sum(
        max(_read_batch(run, r["arrived"], "response_ids")["response_ids"].combine_chunks().value_lengths().to_pylist())
        for r in arrived
    )


def shares_by_size(run: Path, config: GrpoConfig, max_staleness: int) -> list[dict[str, Any]]:
    """What became of the groups worth learning from of a run with workers, by the size of their problems: how many
    there were, the mean length of their responses, and the share that was learned from. By the run's schedule, as the
    buffer goes; what still waited at the end is not counted."""
    mix = TaskSampler(config.tasks, config.seed)
    per_update = config.groups_per_step * config.rollouts.steps_per_update
    arrivals = deque(Schedule(schedule_path(run, 0)).arrivals)
    buffer: deque[tuple[int, int]] = deque()  # (group, version)
    sizes: dict[int, int] = {}
    lengths: dict[int, list[int]] = {}
    learned: set[int] = set()
    for version in range(arrivals[-1]["version"] + 1):
        oldest = version - max_staleness
        buffer = deque(one for one in buffer if one[1] >= oldest)
        while arrivals and arrivals[0]["version"] == version:
            arrival = arrivals.popleft()
            rows = _read_batch(run, arrival["arrived"], "group_id", "verdict", "response_ids")
            tokens = rows["response_ids"].combine_chunks().value_lengths().to_pylist()
            for group, verdict, length in zip(
                rows["group_id"].to_pylist(), rows["verdict"].to_pylist(), tokens, strict=True
            ):
                if verdict == "kept":
                    if group not in sizes and arrival["weights"][0][1] >= oldest:
                        buffer.append((group, arrival["weights"][0][1]))
                    sizes[group] = mix.problem("train", group).size
                    lengths.setdefault(group, []).append(length)
        learned |= {buffer.popleft()[0] for _ in range(min(per_update, len(buffer)))}
    decided = sizes.keys() - {group for group, _ in buffer}
    rows = []
    for size in sorted(set(sizes.values())):
        groups = [group for group in decided if sizes[group] == size]
        length = fmean(length for group in groups for length in lengths[group]) if groups else 0.0
        share = sum(group in learned for group in groups) / max(1, len(groups))
        rows.append({"size": size, "groups": len(groups), "response_length": length, "learned": share})
    return rows


def _read_batch(run: Path, batch: int, *columns: str) -> Any:
    return parquet.read_table(run / FOLDER / f"batch-{batch:08d}-rank-00000.parquet", columns=list(columns))


def simulate(
    problems: Sequence[Measured],
    way: str,
    *,
    slots: int,
    per_update: int,
    learn_seconds: float,
    token_seconds: float,
    max_staleness: int,
    updates: int,
    config: GrpoConfig,
) -> Simulated:
    """`slots` problems are generated at once, all workers together; a token of each takes `token_seconds`, an update of
    `per_update` groups `learn_seconds`."""
    pool = _VirtualPool(problems, token_seconds, slots)
    schedule = Schedule(Path(os.devnull))
    executors: dict[str, Executor] = {
        "synchronous": _InRounds(pool),
        "dropping": _Always(pool),
        "pacing": Ahead(
            cast(WorkerPool, pool),
            cast(RolloutWorker, None),
            schedule,
            max_staleness=max_staleness,
            per_update=per_update,
        ),
    }
    store: Any = _NoTraces()
    rollouts = config.rollouts.model_copy(update={"max_staleness": max_staleness})
    config = config.model_copy(update={"rollouts": rollouts})
    controller = Controller(config, executors[way], store, problems=1, rank=0, ranks=1)
    controller.patience = updates * slots  # a batch is one problem here
    ready: list[Group] = []
    waited, learned = 0.0, []
    for version in range(updates):
        pool.published.append(pool.now)
        begin = pool.now
        while len(ready) < per_update:
            groups, _, _ = controller.collect(
                per_update - len(ready), version=version, buffered=len(ready), max_length=1, penalise_length=True,
                heartbeat=lambda: None, hopeless=lambda counts: False,
            )  # fmt: skip
            ready = [group for group in ready + groups if group.version >= version - max_staleness]
        waited += pool.now - begin
        learned += ready[:per_update]
        ready = ready[per_update:]
        pool.now += learn_seconds
    worth = [order for order in pool.finished() if problems[pool.which(order)].kept]
    got = {group.number for group in learned}
    by_length = sorted(worth, key=lambda order: -problems[pool.which(order)].longest)
    thirds = [by_length[len(by_length) * i // 3 : len(by_length) * (i + 1) // 3] for i in range(3)]
    shares = [sum(order.first in got for order in third) / max(1, len(third)) for third in thirds]
    return Simulated(waited / pool.now, shares)


class _VirtualPool:
    """What `Ahead` asks of a `WorkerPool`; nothing runs. An order beyond the slots begins when one is free."""

    def __init__(self, problems: Sequence[Measured], token_seconds: float, slots: int) -> None:
        self.problems, self.token_seconds = problems, token_seconds
        self.slots = self.count = slots
        self.now = 0.0
        self.published: list[float] = []
        """When each version was."""
        self._begun: dict[Order, tuple[float, float]] = {}
        self._free = [0.0] * slots
        self._ends: list[float] = []

    def which(self, order: Order) -> int:
        """The problem that an order is about: any, but always the same."""
        return random.Random(order.first).randrange(len(self.problems))

    def begin(self, order: Order) -> None:
        if order not in self._begun:
            start = max(self.now, heapq.heappop(self._free))
            end = start + self.problems[self.which(order)].longest * self.token_seconds
            self._begun[order] = start, end
            heapq.heappush(self._free, end)
            heapq.heappush(self._ends, end)

    def take(self, order: Order) -> Batch | None:
        start, end = self._begun[order]
        if end > self.now:
            return None
        version = bisect.bisect_right(self.published, start) - 1
        groups = [Group(order.first, version)] if self.problems[self.which(order)].kept else []
        return Batch(order, version, groups, FilterCounts(), [])

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

    def finished(self) -> list[Order]:
        """All orders that are done, but for the last few, which nobody could have learned from yet."""
        done = sorted((end, order.number, order) for order, (_, end) in self._begun.items() if end <= self.now)
        return [order for _, _, order in done[: -4 * self.slots]]


class _Always(Executor):
    """All slots are in use all the time."""

    def __init__(self, pool: _VirtualPool) -> None:
        self.pool = pool

    def next(self, controller: Controller, wanted: int) -> Batch | None:
        """As `Executor.next`."""
        while True:
            while len(controller.under_way) < 2 * self.pool.slots:
                self.pool.begin(controller.draw())
            for order in controller.under_way.values():
                if batch := self.pool.take(order):
                    return batch
            if not wanted:
                return None
            self.pool.wait(None)


class _InRounds(_Always):
    """Slots are filled together, and emptied to the last before anything is learned."""

    def next(self, controller: Controller, wanted: int) -> Batch | None:
        """As `Executor.next`."""
        if not controller.under_way:
            if not wanted:
                return None
            for _ in range(self.pool.slots):
                self.pool.begin(controller.draw())
        while True:
            for order in controller.under_way.values():
                if batch := self.pool.take(order):
                    return batch
            self.pool.wait(None)


class _NoTraces:
    def append(self, number: int, traces: Any) -> None:
        """Nothing to keep."""
