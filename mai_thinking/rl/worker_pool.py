"""Rollout workers, as processes on this machine or elsewhere (`rl.ray_worker`): hands out batches, and sees to it
that each is answered.

A worker that dies, or does not move for `hang_seconds`, is started again, and its batches go to whoever is free. One
that dies again and again rests, longer each time, and is tried with one batch before it is trusted again. What a killed
worker may still have had to say is not listened to: its connection went with it.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import torch.multiprocessing

from mai_thinking.errors import RunError
from mai_thinking.rl.rollout_worker import RolloutBatch
from mai_thinking.rl.worker_process import WorkerSetup, work

HANG_SECONDS = 120.0  # A worker with a batch that does not move for so long is hung
START_SECONDS = 180.0  # More that it has at its start, for imports and the model
_DEATHS = 3  # In a row, before a worker rests
_REST_SECONDS = 5.0  # The first time; twice as long each time
_LAST_DEATH = 8  # In a row, of every worker: the run ends
_PATIENCE = 0.2
_WARM = ["mai_thinking.training.warm_process", "torch", "mai_thinking.rl.worker_process"]
"""What the workers are forked with: imports take three seconds of a core, all else of a start half a one."""
_CLOSE_SECONDS = 3.0


class WorkerPool(AbstractContextManager["WorkerPool"]):
    """`count` workers, for one thread."""

    def __init__(self, setup: WorkerSetup, workers: "Sequence[Worker]", hang_seconds: float = HANG_SECONDS) -> None:
        """Starts them; returns at once."""
        self.count, self.hang_seconds = len(workers), hang_seconds
        self.weights, self.spool = setup.weights, setup.spool
        self.deaths = 0  # Of all workers so far
        self._workers = workers
        self._waiting: deque[RolloutBatch] = deque()
        self._begun: dict[RolloutBatch, bool] = {}  # and whether it is answered
        self._taken: list[tuple[float, float]] = []  # begin and end of batches since the last `idle_share`
        self._told = time.time()
        for worker in workers:
            worker.start()

    def begin(self, batch: RolloutBatch) -> None:
        """Have it answered, unless that is under way or, by an earlier process of the run, done."""
        if batch in self._begun:
            return
        self._begun[batch] = self.spool.read(batch) is not None
        if not self._begun[batch]:
            self._waiting.append(batch)
            self._hand_out()

    def withdraw(self) -> RolloutBatch | None:
        """A batch that no worker has been sent, if there is one: the caller answers it."""
        if not self._waiting:
            return None
        batch = self._waiting.pop()
        del self._begun[batch]
        return batch

    def take(self, begun: RolloutBatch) -> RolloutBatch | None:
        """Its answer, if it is there."""
        batch = self.spool.read(begun) if self._begun.get(begun, True) else None
        if batch is not None:
            self._begun.pop(begun, None)
            end = batch.began + batch.seconds
            self._taken.append((batch.began, end))
            if 0 <= batch.worker < self.count:
                worker = self._workers[batch.worker]
                worker.free_since = max(worker.free_since, end)
        return batch

    def discard(self, number: int) -> None:
        """The answer is no longer needed."""
        self.spool.discard(number)

    def give_up(self) -> None:
        """All that is not answered: it is for weights that are to be retracted."""
        self.weights.retract()
        for batch in self._begun:
            self.spool.discard(batch.number)
        self._waiting.clear()
        self._begun.clear()

    def poll(self) -> None:
        """Take note of what has happened."""
        self._advance(0.0)

    def wait(self, heartbeat: Callable[[], None]) -> None:
        """Until something happens, or for a moment. `heartbeat` is called if a worker has moved. RunError if none of
        them can live."""
        before = [worker.moved for worker in self._workers]
        self._advance(_PATIENCE)
        if before != [worker.moved for worker in self._workers]:
            heartbeat()

    def idle_share(self) -> float:
        """Of all workers' time since the last call, the share in which they neither made a batch that was taken nor, as
        far as this process knows, are at one now."""
        begin, now = self._told, time.time()
        at_work = [max(worker.asked[0][1], worker.free_since) for worker in self._workers if worker.asked]
        spans = [*self._taken, *((start, now) for start in at_work)]
        busy = sum(max(0.0, min(end, now) - max(start, begin)) for start, end in spans)
        self._told, self._taken = now, []
        return min(1.0, max(0.0, 1 - busy / (self.count * max(now - begin, 1e-9))))

    def close(self) -> None:
        """End the processes: they are asked to, and have a moment."""
        self.weights.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for worker in self._workers:
            worker.leave(deadline)

    def __exit__(self, *error: object) -> None:
        self.close()

    def _advance(self, timeout: float) -> None:
        living = [worker for worker in self._workers if worker.process is not None]
        if living:
            living[0].wait_for(living, timeout)
        else:
            time.sleep(timeout)  # all rest
        for worker in living:
            for batch, problem in worker.read():
                if problem is not None:
                    raise RunError(f"a rollout worker cannot go on: {problem}")
                if batch in self._begun:
                    self._begun[batch] = True
        now = time.monotonic()
        for worker in living:
            # A worker that had nothing to do has not moved either.
            idle = min(now - worker.moved, time.time() - worker.asked[0][1]) if worker.asked else 0.0
            if worker.ended:
                self._bury(worker, "died")
            elif idle > self.hang_seconds:
                self._bury(worker, f"did not move for {idle:.0f} s")
        for worker in self._workers:
            if worker.process is None and now >= worker.rests_until:
                worker.start()
        self._hand_out()

    def _bury(self, worker: "Worker", how: str) -> None:
        """Its batches are the next to be handed out."""
        self._waiting.extendleft(batch for batch, _ in reversed(worker.asked) if batch in self._begun)
        worker.deaths += bool(worker.asked) or worker.ended
        worker.end()
        self.deaths += 1
        rest = _REST_SECONDS * 2 ** (worker.deaths - _DEATHS) if worker.deaths >= _DEATHS else 0.0
        worker.rests_until = time.monotonic() + rest
        note = f"; it rests for {rest:.0f} s" if rest else ""
        print(f"rollout worker {worker.number} {how}; others answer for it{note}", file=sys.stderr, flush=True)
        if all(one.deaths >= _LAST_DEATH for one in self._workers):
            raise RunError("all rollout workers die, one start after the other; their last words are above")

    def _hand_out(self) -> None:
        """One batch each, then a second, so that nobody waits for this process; but one at a time to whoever died."""
        for most in (1, 2):
            for worker in self._workers:
                room = worker.ready and len(worker.asked) < (1 if worker.deaths else most)
                if room and self._waiting:
                    worker.ask(self._waiting.popleft())


@dataclass(eq=False)
class Worker:
    """One worker, a process on this machine, and what it has been asked. `rl.ray_worker` has those on others."""

    number: int
    setup: WorkerSetup
    asked: deque[tuple[RolloutBatch, float]] = field(default_factory=deque)  # and when, in Unix time
    deaths: int = 0  # in a row, without an answer
    rests_until: float = 0.0
    free_since: float = 0.0  # Unix time of its last answer that was taken
    ended: bool = False
    process: Any = None  # None: it was not started, or was ended
    connection: Any = None

    @property
    def ready(self) -> bool:
        """Whether it may be asked: it will come to it."""
        return self.process is not None

    @property
    def moved(self) -> float:
        """When it last moved, by the monotonic clock."""
        return float(self.setup.beats[self.number])

    def start(self) -> None:
        """Returns at once."""
        self.setup.beats[self.number] = time.monotonic() + START_SECONDS
        self.ended = False
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_WARM)
        self.connection, its_end = context.Pipe()
        self.process = context.Process(target=work, args=(self.setup, self.number, its_end), daemon=False)
        self.process.start()
        its_end.close()

    def ask(self, batch: RolloutBatch) -> None:
        """Answer this one too."""
        self.asked.append((batch, time.time()))
        try:
            self.connection.send(batch)
        except OSError:
            self.ended = True

    def read(self) -> list[tuple[RolloutBatch, str | None]]:
        """Batches that are dealt with, and what went wrong. Sets `ended`."""
        found = []
        try:
            while self.connection.poll():
                found.append(self.connection.recv())
                self.asked.popleft()
                self.deaths = 0
        except (EOFError, OSError):
            self.ended = True
        return found

    def end(self) -> None:
        """Kill it if it lives, and forget what it was asked."""
        if self.process is not None:
            self.process.kill()  # also one that is stopped
            self.process.join()
            self.connection.close()
            self.process = None
            self.asked.clear()

    @staticmethod
    def wait_for(workers: "Sequence[Any]", timeout: float) -> None:
        """Until one of them has something to say."""
        wait([worker.connection for worker in workers], timeout)

    def leave(self, deadline: float) -> None:
        """End it, more gently until the deadline of the monotonic clock, after the weights were closed."""
        if self.process is not None:
            self.connection.close()
            self.process.join(max(0.0, deadline - time.monotonic()))
        self.end()
