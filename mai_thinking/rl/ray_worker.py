"""Rollout workers as actors of a Ray cluster, where one machine is not enough (MAI-Thinking-1 report §3.6).

Ray places them, carries weights and batches, and tells of deaths, a whole machine's too; the pool does the rest, as for
processes. The cluster's machines need this package, and `init_from` at the path that the learner has it at.
"""

import importlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mai_thinking.errors import UsageError
from mai_thinking.rl.rollout_worker import RolloutBatch
from mai_thinking.rl.worker_pool import START_SECONDS, Worker
from mai_thinking.rl.worker_process import Answering, NewestWeights, SharedWeights

try:
    ray: Any = importlib.import_module("ray")
except ImportError as error:
    raise UsageError("rollouts.ray: Ray is not installed; pip install 'mai_thinking[ray]'") from error

_ASKED_EVERY = 1.0  # Seconds between questions whether a worker moves


class SentWeights(SharedWeights):
    """Weights that each published version of is also put where actors find it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.actors: list[Any] = []
        self.news: tuple[int, Any] = (0, None)  # How often they changed, and (version, reference to tensors) or None

    def retract(self) -> None:
        super().retract()
        self._tell(None)

    def publish(self, version: int) -> None:
        super().publish(version)
        self._tell((version, [ray.put(self.parameters)]))

    def tell(self, actor: Any) -> None:
        """The newest."""
        actor.take.remote(*self.news)

    def _tell(self, newest: Any) -> None:
        self.news = (self.news[0] + 1, newest)
        for actor in self.actors:
            self.tell(actor)


class _Received(NewestWeights):
    """Those that an actor was sent."""

    def __init__(self) -> None:
        self.news = 0
        self._newest: tuple[int, list[Any]] | None = None

    @property
    def version(self) -> int | None:
        return self._newest[0] if self._newest else None

    def take(self, news: int, newest: tuple[int, list[Any]] | None) -> None:
        self._newest, self.news = newest, news

    def read(self, load: Callable[[Iterable[torch.Tensor]], None]) -> int | None:
        if (newest := self._newest) is None:
            return None
        load(ray.get(newest[1][0]))
        return newest[0]


class _Actor:
    """Lives on one of the cluster's machines. Answers in a thread of its own, so that it hears of weights meanwhile."""

    def __init__(self, config: dict[str, Any], ranks: int, threads: int) -> None:
        self._given, self._weights = (config, ranks, threads), _Received()
        self._answering: Answering | None = None
        self._beats = 0

    def take(self, news: int, newest: Any) -> None:
        """Other weights."""
        self._weights.take(news, newest)

    def beats(self) -> int:
        """How often it has moved."""
        return self._beats

    @ray.method(concurrency_group="answers")
    def answer(self, batch: RolloutBatch, news: int) -> RolloutBatch | str | None:
        """The batch, None if it was given up, or what went wrong for good; once it has heard the `news`."""
        try:
            if self._answering is None:  # here, since threads are a matter of each thread
                self._answering = Answering(*self._given, self._weights, self._beat)
            while self._weights.news < news:
                time.sleep(0.001)
            return self._answering.answer(batch)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def _beat(self) -> None:
        self._beats += 1


@dataclass(eq=False)
class RayWorker(Worker):
    """An actor, on whichever machine has room; `process` is its handle."""

    _answers: deque[Any] = field(default_factory=deque)
    _question: Any = None  # How often it has moved
    _asked_at: float = 0.0
    _beats: int = -1

    @property
    def ready(self) -> bool:
        """Not while it waits for a machine: after the death of one there may be none that has room."""
        return self.process is not None and self._beats >= 0

    @property
    def weights(self) -> SentWeights:
        """Of which it is told."""
        assert isinstance(self.setup.weights, SentWeights)
        return self.setup.weights

    def start(self) -> None:
        setup = self.setup
        setup.beats[self.number] = time.monotonic() + START_SECONDS
        self._beats, self.ended = -1, False
        remote = ray.remote(scheduling_strategy="SPREAD", num_cpus=setup.threads, concurrency_groups={"answers": 1})
        self.process = remote(_Actor).remote(setup.config, setup.ranks, setup.threads)
        self.weights.actors.append(self.process)
        self.weights.tell(self.process)

    def ask(self, batch: RolloutBatch) -> None:
        self.asked.append((batch, time.time()))
        self._answers.append(self.process.answer.remote(batch, self.weights.news[0]))

    def read(self) -> list[tuple[RolloutBatch, str | None]]:
        found = []
        try:
            while self._answers and _ready(self._answers[0]):
                answer = ray.get(self._answers[0])
                if isinstance(answer, RolloutBatch):
                    answer.worker = self.number
                    self.setup.spool.write(answer)
                self._answers.popleft()
                found.append((self.asked.popleft()[0], answer if isinstance(answer, str) else None))
                self.deaths = 0
            self._look()
        except ray.exceptions.RayError:
            self.ended = True
        return found

    def _look(self) -> None:
        """Learn when it last moved, and ask again."""
        now = time.monotonic()
        if self._question is not None and _ready(self._question):
            beats, self._question = ray.get(self._question), None
            if beats != self._beats:
                self._beats, self.setup.beats[self.number] = beats, now
        if self._question is None and now - self._asked_at > _ASKED_EVERY:
            self._question, self._asked_at = self.process.beats.remote(), now

    def end(self) -> None:
        if self.process is not None:
            self.weights.actors.remove(self.process)
            ray.kill(self.process)
            self.process = self._question = None
            self._answers.clear()
            self.asked.clear()

    def leave(self, deadline: float) -> None:
        self.end()

    @staticmethod
    def wait_for(workers: "Sequence[Any]", timeout: float) -> None:
        answers = [answer for worker in workers for answer in list(worker._answers)[:1]]
        if answers:
            ray.wait(answers, timeout=timeout, fetch_local=False)
        else:
            time.sleep(timeout)


def _ready(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0, fetch_local=False)[0])
