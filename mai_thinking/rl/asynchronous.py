"""Collectors for which workers generate, and when they do (MAI-Thinking-1 report §3.6).

`InTurn`: workers generate, and only what the newest weights made is learned from, bit for bit as by
`collector.InProcess`. `Ahead`: workers generate while the learner learns; a batch is begun only if its groups can, by
the share kept so far, be learned from within `max_staleness` updates, so that little is thrown away for being slow.
What arrived when is on record, so that a run that was killed learns from the same groups again; `Replay` makes them
again, in one process.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from mai_thinking.data.cluster import connect
from mai_thinking.errors import RunError, UsageError
from mai_thinking.rl.collector import Collector, InProcess
from mai_thinking.rl.rollout_worker import RolloutBatch, RolloutWorker
from mai_thinking.rl.schedule import Schedule, Spool, schedule_path
from mai_thinking.rl.traces import TraceStore
from mai_thinking.rl.worker_pool import Worker, WorkerPool
from mai_thinking.rl.worker_process import SharedWeights, WorkerSetup
from mai_thinking.training.checkpoint_storage import visible_steps
from mai_thinking.training.context import RunContext
from mai_thinking.training.metrics import Record


class _ByWorkers(Collector):
    """On weights in shared memory."""

    def __init__(self, worker: RolloutWorker, traces: TraceStore, pool: WorkerPool, *, rank: int) -> None:
        super().__init__(worker, traces, rank=rank)
        self.pool = pool

    def retract(self) -> None:
        self.pool.weights.retract()

    def publish(self, version: int) -> None:
        self.pool.weights.publish(version)

    def metrics(self) -> dict[str, float]:
        return {"idle/workers": self.pool.idle_share()}

    def finish(self) -> None:
        self.pool.spool.clear()


class InTurn(_ByWorkers):
    """Workers answer the batches that one process would answer, with the same weights, and these are taken in in the
    same order. What they began beyond that is given up."""

    def next(self, wanted: int) -> RolloutBatch | None:
        begun_before = any(batch.only != self.version for batch in self.under_way.values())
        if not wanted or begun_before:  # the latter by a filling that was broken off
            self.pool.give_up()
            self.put_back()
        if not wanted:
            return None
        if begun_before:
            self.publish(self.version)
        while len(self.under_way) < self.pool.count:
            self.pool.begin(self.draw(only_newest=True))
        first = self.under_way[min(self.under_way)]
        while (batch := self.pool.take(first)) is None:
            self.pool.wait(self.worker.engine.heartbeat)
        self.pool.discard(first.number)
        return batch


class Ahead(_ByWorkers):
    """Workers answer batches while the learner learns; rather than wait for them, this process answers one too. What
    was begun and what arrived is on record, and the record comes first: what it has of this step is done again before
    anything new."""

    def __init__(
        self, worker: RolloutWorker, traces: TraceStore, pool: WorkerPool, schedule: Schedule, *, rank: int,
        needed_from: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        """`needed_from`: the version from which on a checkpoint may have to learn again."""
        super().__init__(worker, traces, pool, rank=rank)
        self.schedule, self.needed_from = schedule, needed_from
        rollouts = self.config.rollouts
        self.max_staleness = rollouts.max_staleness
        # Groups that this rank learns from between two updates of the weights
        self.per_update = self.config.groups_per_step // worker.ranks * rollouts.steps_per_update
        self._generated = 0.0
        self._resumed = False  # what was under way when the run was killed
        self._kept = [1, 1]  # problems begun, and groups of them that were kept

    def next(self, wanted: int) -> RolloutBatch | None:
        if arrival := next_arrival(self.schedule, self):
            batch = self.pool.take(self.under_way[arrival["arrived"]])
            if batch is None:
                raise RunError(f"{self.schedule.path}: batch {arrival['arrived']} arrived, and is gone")
            return self._count(batch)
        if self.schedule.ahead:  # the run was killed later than this
            return None
        for number in self.schedule.forget_before(self.needed_from()):
            self.pool.discard(number)
        if not self._resumed:
            self._resumed = True
            for begun in self.under_way.values():
                self.pool.begin(begun)
        while True:
            self._admit()
            self.pool.poll()
            for begun in self.under_way.values():
                if batch := self.pool.take(begun):
                    self.schedule.add_arrival(self.version, batch)
                    return self._count(batch)
            if not wanted:
                return None
            if mine := self.pool.withdraw():  # from this process's engine, whose weights the workers share
                batch = self.worker.answer(mine, self.version)
                batch.worker, self._generated = -1, self._generated + batch.seconds
                self.pool.spool.write(batch)
                self.schedule.add_arrival(self.version, batch)
                return self._count(batch)
            self.pool.wait(self.worker.engine.heartbeat)

    def metrics(self) -> dict[str, float]:
        """With `generation_seconds`, which are this process's own."""
        generated, self._generated = self._generated, 0.0
        return super().metrics() | {"generation_seconds": generated}

    def in_time(self, groups: float) -> bool:
        """Whether the last of so many groups can be learned from before it is too old."""
        return (groups - 1) // self.per_update <= self.max_staleness

    def _count(self, batch: RolloutBatch) -> RolloutBatch:
        self._kept = [self._kept[0] + self.worker.problems, self._kept[1] + len(batch.groups)]
        return batch

    def _admit(self) -> None:
        """Begin batches whose last group would, by the share that was kept so far, be learned from in time; and one in
        any case where groups are lacking and none is under way."""
        expected = self.worker.problems * self._kept[1] / self._kept[0]
        while len(self.under_way) < 2 * self.pool.count + 1:
            before = len(self.buffer) + len(self.under_way) * expected
            lacking = len(self.buffer) < self.per_update and not self.under_way
            if not (lacking or self.in_time(before + expected)):
                break
            batch = self.draw()
            self.schedule.add_begun(self.version, batch)
            self.pool.begin(batch)


class Replay(Collector):
    """Does what a schedule has on record again, in one process: each batch with the weights that wrote it, from
    decoding step to decoding step."""

    def __init__(self, worker: RolloutWorker, traces: TraceStore, schedule: Schedule, *, rank: int) -> None:
        super().__init__(worker, traces, rank=rank)
        self.engine, self.schedule = worker.engine, schedule
        self._weights: dict[int, list[Tensor]] = {}
        self._lag = max((arrival["version"] - arrival["weights"][0][1] for arrival in schedule.arrivals), default=0)

    def publish(self, version: int) -> None:
        self._weights[version] = [parameter.clone() for parameter in self.engine.model.parameters()]
        self._weights.pop(version - self._lag - 1, None)

    def next(self, wanted: int) -> RolloutBatch | None:
        if arrival := next_arrival(self.schedule, self):
            return self._answer(self.under_way[arrival["arrived"]], dict(arrival["weights"]))
        if wanted:
            raise RunError(f"{self.schedule.path}: ends at update {self.version}; make `steps` as few")
        return None

    def _answer(self, batch: RolloutBatch, at: dict[int, int]) -> RolloutBatch:
        """As it was written then: with the weights of version `at[n]` from the decoding step n on."""
        steps, heartbeat = 0, self.engine.heartbeat

        def between_tokens() -> None:
            nonlocal steps
            steps += 1
            heartbeat()
            if steps in at:
                self.engine.load_parameters(self._weights[at[steps]])

        self.engine.load_parameters(self._weights[at[0]])
        self.engine.heartbeat = between_tokens
        try:
            return self.worker.answer(batch, at[0])
        finally:
            self.engine.heartbeat = heartbeat


def make_collector(worker: RolloutWorker, traces: TraceStore, context: RunContext) -> Collector:
    """As the config's `rollouts` says. Workers are started, with their share of this process's threads; they end with
    `context.stack`. UsageError if it cannot be had."""
    config, run, rank, stack = worker.config, context.folder.path, context.rank, context.stack
    rollouts = config.rollouts
    if rollouts.replay:
        path = schedule_path(Path(rollouts.replay), rank)
        if not path.exists():
            raise UsageError(f"rollouts.replay: {path} does not exist; name the folder of a run with rollouts.workers")
        return Replay(worker, traces, Schedule(path), rank=rank)
    if not rollouts.workers:
        return InProcess(worker, traces, rank=rank)
    if context.device.type != "cpu":
        raise UsageError(f"rollouts.workers: {rollouts.workers} workers share a CPU's memory; on a GPU make it 0")
    before = torch.get_num_threads()
    threads = max(1, before // (1 + rollouts.workers))
    torch.set_num_threads(threads)
    stack.callback(torch.set_num_threads, before)
    beats = torch.zeros(rollouts.workers, dtype=torch.float64).share_memory_()
    kind: type[Worker]
    weights_kind: type[SharedWeights]
    kind, weights_kind = (Worker, SharedWeights) if rollouts.ray is None else _on_ray(rollouts.ray, stack)
    weights = weights_kind(worker.engine.model)
    setup = WorkerSetup(config.model_dump(mode="json"), context.ranks, weights, Spool(run, rank), beats, threads)
    pool = stack.enter_context(WorkerPool(setup, [kind(number, setup) for number in range(rollouts.workers)]))
    if not rollouts.max_staleness:
        return InTurn(worker, traces, pool, rank=rank)

    def needed_from() -> int:
        return -(-min(visible_steps(context.folder.checkpoints), default=0) // rollouts.steps_per_update)

    return Ahead(worker, traces, pool, Schedule(schedule_path(run, rank)), rank=rank, needed_from=needed_from)


def _on_ray(address: str, stack: ExitStack) -> tuple[type[Worker], type[SharedWeights]]:
    """Until `stack` closes."""
    from mai_thinking.rl import ray_worker  # here, since Ray is an extra

    stack.callback(connect("rollouts.ray", address).shutdown)
    return ray_worker.RayWorker, ray_worker.SentWeights


def next_arrival(schedule: Schedule, collector: Collector) -> Record | None:
    """The next one on record of the collector's version, when the batches begun before it are drawn again."""
    while (record := schedule.next_of(collector.version)) and "begun" in record:
        collector.redraw(RolloutBatch(**record["begun"]))
    return record
