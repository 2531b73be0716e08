"""The controller of a climb: which problems are begun when, and what becomes of their rollouts (report §3.1, §3.6).

One loop, four executors. `InProcess`: generation, then learning, in one process. `InTurn`: workers generate, and only
what the newest weights made is learned from, bit for bit as in one process. `Ahead`: workers generate while the learner
learns; a batch is begun only if its groups can be learned from within `max_staleness` updates, so that none is thrown
away for being slow. What arrived when is on record, so that a run that was killed learns from the same groups again;
`Replay` makes them again, in one process.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from torch import Tensor

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.errors import RunError
from mai_thinking.rl.engine import BatchedEngine
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.rollout import Group
from mai_thinking.rl.rollout_worker import Batch, Order, RolloutWorker
from mai_thinking.rl.schedule import Arrival, Schedule
from mai_thinking.rl.traces import TraceStore
from mai_thinking.rl.worker_pool import WorkerPool

FRUITLESS_BATCHES = 50
"""So many batches in a row without a group to learn from end the run: the tasks are out of the policy's reach."""


class Executor(Protocol):
    """Who answers the controller's orders."""

    def next(self, controller: "Controller", wanted: int) -> Batch | None:
        """A batch to take in, while `wanted` groups are lacking; None if there is none and none is lacking."""


class Controller:
    """One rank's supply of groups. Its state says which problem and batch come next, and which are under way."""

    def __init__(
        self, config: GrpoConfig, executor: Executor, traces: TraceStore, *, problems: int, rank: int, ranks: int
    ) -> None:
        """`problems` of a batch."""
        self.config, self.executor, self.traces = config, executor, traces
        self.problems, self.rank, self.ranks = problems, rank, ranks
        self.next_problem, self.next_batch = rank, 0
        self.under_way: dict[int, Order] = {}
        """By number: begun, and not taken in."""
        self.counts = FilterCounts()
        """Of what was taken in since the last `take_counts`."""
        self.patience = FRUITLESS_BATCHES
        self.version = self.buffered = self._fruitless = 0
        self._lengths = (0, True)
        self.heartbeat: Callable[[], None] = lambda: None

    def collect(
        self, wanted: int, *, version: int, buffered: int, max_length: int, penalise_length: bool,
        heartbeat: Callable[[], None], hopeless: Callable[[FilterCounts], bool],
    ) -> list[Group]:  # fmt: skip
        """At least `wanted` groups to learn from, batch by batch, where `buffered` wait already; fewer if the tasks are
        solved, or it is `hopeless`, by the counts since the last `take_counts`, to go on. `version`: of the newest
        weights. RunError if none comes up for too long."""
        self.version, self.heartbeat, self._lengths = version, heartbeat, (max_length, penalise_length)
        groups: list[Group] = []
        while batch := self._next(wanted - len(groups), buffered + len(groups)):
            self.counts.add(batch.counts)
            self.traces.append(batch.order.number, batch.traces)
            groups += batch.groups
            if len(groups) < wanted and (self.counts.solved or hopeless(self.counts)):
                break
            self._fruitless = 0 if batch.groups else self._fruitless + 1
            if self._fruitless == self.patience:
                raise RunError(
                    f"step {version * self.config.rollouts.steps_per_update}: {self.patience} batches of problems "
                    f"without one to learn from ({self.counts.metrics()}); easier tasks, wider sampling ranges or "
                    "larger groups would help"
                )
            heartbeat()
        return groups

    def draw(self, *, only_newest: bool = False) -> Order:
        """The next order; `only_newest` weights may answer it."""
        version = self.version if only_newest else None
        order = Order(self.next_batch, self.next_problem, *self._lengths, version)
        self.redraw(order)
        return order

    def redraw(self, order: Order) -> None:
        """The order that is on record as the next one."""
        self.under_way[order.number] = order
        self.next_batch = order.number + 1
        self.next_problem = order.first + self.problems * self.ranks

    def put_back(self) -> None:
        """All that is under way is to be drawn again."""
        if self.under_way:
            first = self.under_way[min(self.under_way)]
            self.next_batch, self.next_problem = first.number, first.first
            self.under_way.clear()

    def take_counts(self) -> FilterCounts:
        """What became of the problems since the last call."""
        counts, self.counts = self.counts, FilterCounts()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        under_way = [asdict(order) for order in self.under_way.values()]
        return {"next_problem": self.next_problem, "next_batch": self.next_batch, "under_way": under_way}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; before there were workers, nothing was under way."""
        self.next_problem, self.next_batch = state["next_problem"], state["next_batch"]
        self.under_way = {one["number"]: Order(**one) for one in state.get("under_way", ())}

    def load_from_world(self, states: list[Any], rank: int, world: int) -> None:
        """Behind the furthest of all ranks, in step with the new number of them."""
        first = max(state["next_problem"] for state in states)
        self.next_problem = (first // world + 1) * world + rank
        self.next_batch = max(state["next_batch"] for state in states)

    def _next(self, wanted: int, buffered: int) -> Batch | None:
        self.buffered = buffered
        batch = self.executor.next(self, max(0, wanted))
        if batch is not None:
            self.under_way.pop(batch.order.number)
        return batch


class InProcess:
    """Generates when groups are lacking, in this process."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker

    def next(self, controller: Controller, wanted: int) -> Batch | None:
        """As `Executor.next`."""
        return self.worker.answer(controller.draw(), controller.version) if wanted else None


class InTurn:
    """Workers answer the orders that one process would answer, with the same weights, and what they answer is taken in
    in the same order. What they began beyond that is given up."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool

    def next(self, controller: Controller, wanted: int) -> Batch | None:
        """As `Executor.next`."""
        if not wanted:
            self.pool.give_up()
            controller.put_back()
            return None
        while len(controller.under_way) < self.pool.count:
            self.pool.begin(controller.draw(only_newest=True))
        order = controller.under_way[min(controller.under_way)]
        while (batch := self.pool.take(order)) is None:
            self.pool.wait(controller.heartbeat)
        self.pool.discard(order.number)
        return batch


class Ahead:
    """Workers answer orders while the learner learns. Orders and arrivals are on record, and the record comes first:
    what it has of this step is done again before anything new."""

    def __init__(
        self,
        pool: WorkerPool,
        schedule: Schedule,
        *,
        max_staleness: int,
        per_update: int,
        needed_from: Callable[[], int] = lambda: 0,
    ) -> None:
        """`per_update`: groups that this rank learns from between two updates of the weights. `needed_from`: the
        version from which on a checkpoint may have to learn again."""
        self.pool, self.schedule, self.needed_from = pool, schedule, needed_from
        self.max_staleness, self.per_update = max_staleness, per_update
        self._resumed = False  # what was under way when the run was killed
        self._kept = [1, 1]  # problems begun, and groups of them that were kept

    def next(self, controller: Controller, wanted: int) -> Batch | None:
        """As `Executor.next`."""
        if arrival := next_arrival(self.schedule, controller):
            return self._count(controller, self._arrived(arrival.number, controller))
        if self.schedule.ahead:  # the run was killed later than this
            return None
        for number in self.schedule.forget_before(self.needed_from()):
            self.pool.discard(number)
        if not self._resumed:
            self._resumed = True
            for order in controller.under_way.values():
                self.pool.begin(order)
        while True:
            self._admit(controller)
            self.pool.poll()
            for order in controller.under_way.values():
                if batch := self.pool.take(order):
                    self.schedule.add_arrival(controller.version, batch)
                    return self._count(controller, batch)
            if not wanted:
                return None
            self.pool.wait(controller.heartbeat)

    def _arrived(self, number: int, controller: Controller) -> Batch:
        """The batch whose arrival is on record."""
        batch = self.pool.take(controller.under_way[number])
        if batch is None:
            raise RunError(f"{self.schedule.path}: batch {number} arrived, and is gone")
        return batch

    def _count(self, controller: Controller, batch: Batch) -> Batch:
        self._kept = [self._kept[0] + controller.problems, self._kept[1] + len(batch.groups)]
        return batch

    def _admit(self, controller: Controller) -> None:
        """Begin batches whose last group would, by the share that was kept so far, be learned from in time; and one in
        any case where groups are lacking and none is under way."""
        expected = controller.problems * self._kept[1] / self._kept[0]
        while len(controller.under_way) < 2 * self.pool.count:
            before = controller.buffered + len(controller.under_way) * expected
            in_time = (before + expected - 1) // self.per_update <= self.max_staleness
            lacking = controller.buffered < self.per_update and not controller.under_way
            if not (in_time or lacking):
                break
            order = controller.draw()
            self.schedule.add_order(controller.version, order)
            self.pool.begin(order)


class Replay:
    """Does what a schedule has on record again, in one process: each batch with the weights that wrote it, from
    decoding step to decoding step."""

    def __init__(self, worker: RolloutWorker, engine: BatchedEngine, schedule: Schedule) -> None:
        self.worker, self.engine, self.schedule = worker, engine, schedule
        self._weights: dict[int, list[Tensor]] = {}
        self._lag = max((arrival.version - arrival.weights[0][1] for arrival in schedule.arrivals), default=0)

    def remember(self, version: int) -> None:
        """That the engine's weights are this version now."""
        self._weights[version] = [parameter.clone() for parameter in self.engine.model.parameters()]
        self._weights.pop(version - self._lag - 1, None)

    def next(self, controller: Controller, wanted: int) -> Batch | None:
        """As `Executor.next`."""
        if arrival := next_arrival(self.schedule, controller):
            return self._answer(controller.under_way[arrival.number], arrival.weights)
        if wanted:
            raise RunError(f"{self.schedule.path}: ends at update {controller.version}; make `steps` as few")
        return None

    def _answer(self, order: Order, weights: list[tuple[int, int]]) -> Batch:
        """The batch as it was written then."""
        steps, at = 0, dict(weights)
        heartbeat = self.engine.heartbeat

        def between_tokens() -> None:
            nonlocal steps
            steps += 1
            heartbeat()
            if steps in at:
                self.engine.load_parameters(self._weights[at[steps]])

        self.engine.load_parameters(self._weights[at[0]])
        self.engine.heartbeat = between_tokens
        try:
            return self.worker.answer(order, at[0])
        finally:
            self.engine.heartbeat = heartbeat


def next_arrival(schedule: Schedule, controller: Controller) -> Arrival | None:
    """The next one on record of the controller's version, when the orders before it are drawn again."""
    while isinstance(event := schedule.next_of(controller.version), Order):
        controller.redraw(event)
    return event
