"""Where the groups come from that an RL run learns from: which problems are begun, and what becomes of their rollouts
(MAI-Thinking-1 report §3.1, §3.6). One loop; `rl.asynchronous` has those collectors for which workers generate.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

from mai_thinking.errors import RunError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.rollout import Group
from mai_thinking.rl.rollout_worker import RolloutBatch, RolloutWorker
from mai_thinking.rl.traces import TraceStore

FRUITLESS_BATCHES = 50
"""So many batches in a row without a group to learn from end the run: the tasks are out of the policy's reach."""


class Collector(ABC):
    """One rank's supply of groups: those that wait in `buffer`, and batches of problems for more. Its state is this
    rank's own: the groups that wait, which problem and batch come next, and which are under way."""

    def __init__(self, worker: RolloutWorker, traces: TraceStore, *, rank: int) -> None:
        """`worker` is this process's."""
        self.worker, self.config, self.traces, self.rank = worker, worker.config, traces, rank
        self.buffer: deque[Group] = deque()  # First in, first out
        self.next_problem, self.next_batch = rank, 0
        self.under_way: dict[int, RolloutBatch] = {}  # By number: begun, and not taken in
        self.patience = FRUITLESS_BATCHES
        self.version = self._fruitless = 0
        self._lengths = (0, True)

    @abstractmethod
    def next(self, wanted: int) -> RolloutBatch | None:
        """A batch to take in, while `wanted` groups are lacking; None if there is none and none is lacking."""

    def give_weights(self, model: MaiThinkingForCausalLM, version: int | None = None) -> None:
        """The learner's to this process's engine, and as `version` to whoever else generates."""
        self.retract()
        self.worker.engine.update_weights(model)
        if version is not None:
            self.publish(version)

    def retract(self) -> None:  # noqa: B027 - nothing to do in one process
        """The engine's weights are about to change."""

    def publish(self, version: int) -> None:  # noqa: B027
        """They are this version from now on."""

    def metrics(self) -> dict[str, float]:
        """Since they were last asked for."""
        return {}

    def finish(self) -> None:  # noqa: B027
        """The run is at its end: nothing is needed to go on."""

    def fill(
        self,
        size: int,
        *,
        version: int,
        max_length: int,
        penalise_length: bool,
        hopeless: Callable[[FilterCounts], bool],
    ) -> tuple[list[Group], FilterCounts]:
        """Batch by batch, until `size` groups wait in the buffer; fewer if the tasks are solved, or if by the counts so
        far it is `hopeless` to go on. `version`: of the newest weights. → the groups that were too old when they
        arrived, and what became of all problems. RunError if no group comes up for too long."""
        self.version, self._lengths = version, (max_length, penalise_length)
        oldest, counts = version - self.config.rollouts.max_staleness, FilterCounts()
        stale: list[Group] = []
        while (batch := self.next(max(0, size - len(self.buffer)))) is not None:
            del self.under_way[batch.number]
            self.traces.append(batch.number, batch.traces)
            counts.update(batch.counts)
            self.buffer.extend([group for group in batch.groups if group.version >= oldest])
            stale += [group for group in batch.groups if group.version < oldest]
            if len(self.buffer) < size and (counts.solved or hopeless(counts)):
                break
            self._fruitless = 0 if batch.groups else self._fruitless + 1
            if self._fruitless == self.patience:
                raise RunError(
                    f"step {version * self.config.rollouts.steps_per_update}: {self.patience} batches of problems "
                    f"without one to learn from ({counts.metrics()}); easier tasks, wider sampling ranges or "
                    "larger groups would help"
                )
            self.worker.engine.heartbeat()
        return stale, counts

    def drop_stale(self, oldest: int) -> list[Group]:
        """Drop the groups of weights before version `oldest`; → them."""
        stale = [group for group in self.buffer if group.version < oldest]
        for group in stale:
            self.buffer.remove(group)
        return stale

    def take(self, count: int) -> list[Group]:
        """The `count` oldest groups, to learn from."""
        return [self.buffer.popleft() for _ in range(count)]

    def draw(self, *, only_newest: bool = False) -> RolloutBatch:
        """The next batch, to be answered; `only_newest` weights may."""
        only = self.version if only_newest else None
        batch = RolloutBatch(self.next_batch, self.next_problem, *self._lengths, only)
        self.redraw(batch)
        return batch

    def redraw(self, batch: RolloutBatch) -> None:
        """The one that is on record as the next."""
        self.under_way[batch.number] = batch
        self.next_batch = batch.number + 1
        self.next_problem = batch.first + self.worker.problems * self.worker.ranks

    def put_back(self) -> None:
        """All that is under way is to be drawn again."""
        if self.under_way:
            first = self.under_way[min(self.under_way)]
            self.next_batch, self.next_problem = first.number, first.first
            self.under_way.clear()

    def state_dict(self) -> dict[str, Any]:
        """A tree of tensors and plain values."""
        under_way = [batch.asked for batch in self.under_way.values()]
        place = {"next_problem": self.next_problem, "next_batch": self.next_batch, "under_way": under_way}
        return place | {"groups": [group.state_dict() for group in self.buffer]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.next_problem, self.next_batch = state["next_problem"], state["next_batch"]
        self.under_way = {one["number"]: RolloutBatch(**one) for one in state["under_way"]}
        self.buffer = deque(Group.from_state(group) for group in state["groups"])

    def load_from_world(self, states: list[Any], rank: int, world: int) -> None:
        """Behind the furthest of all ranks, in step with the new number of them; of all ranks' groups, in the order of
        their problems, every `world`-th."""
        groups = sorted((g for state in states for g in state["groups"]), key=lambda g: (g["version"], g["number"]))
        self.buffer = deque(Group.from_state(group) for group in groups[rank::world])
        first = max(state["next_problem"] for state in states)
        self.next_problem = (first // world + 1) * world + rank
        self.next_batch = max(state["next_batch"] for state in states)


class InProcess(Collector):
    """Generates when groups are lacking, in this process."""

    def next(self, wanted: int) -> RolloutBatch | None:
        return self.worker.answer(self.draw(), self.version) if wanted else None
