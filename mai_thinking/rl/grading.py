"""Grading of what a model wrote, in processes of their own. MAI-Thinking-1 report §3.1.

An answer may hang a parser, eat memory or crash the interpreter. It does so in a process that the kernel ends at its
limits and that is replaced; the answer scores 0 and no other answer suffers. The processes are started afresh rather
than forked, so that torch's threads in the trainer do no harm, and they never import torch.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from mai_thinking.config.tasks import TaskSection
from mai_thinking.errors import RunError, UsageError
from mai_thinking.rl.tasks.base import LONGEST_ANSWER, Grade, Problem, no_grade

WAIT_FACTOR = 5
"""Wall-clock time that an answer may take, as a multiple of its processor time: for graders that wait and do not work.
Generous, because a busy machine must not make a right answer wrong."""

_BATCH = 256  # Answers that a process gets at a time
_GATHER_SECONDS = 0.001
"""After the first score, wait for more: on a busy machine, being woken for every score costs more than the grading."""
_START_SECONDS = 120.0
_FAILED_STARTS = 3

_Item = tuple[Problem, str | None]


class GradingPool(AbstractContextManager["GradingPool"]):
    """Processes that grade. For one thread, which must outlive the pool (its end would end them too)."""

    def __init__(self, mix_sections: Sequence[TaskSection], *, workers: int, seconds: float, megabytes: int) -> None:
        """`seconds` of processor time for an answer, `megabytes` for a process beyond what it starts with; see
        `GradingSection`. Raises UsageError if a task cannot be had."""
        tasks = [section.model_dump(mode="json") for section in mix_sections]
        setup = {"tasks": tasks, "seconds": seconds, "megabytes": megabytes}
        self._ungraded = {section.name: no_grade(section) for section in mix_sections}
        self._patience = WAIT_FACTOR * seconds
        self._workers = [_Worker(setup) for _ in range(workers)]
        try:
            while not all(worker.ready for worker in self._workers):
                self._advance([], deque(), set())
        except BaseException:
            self.close()
            raise

    def grade(self, items: Sequence[_Item]) -> list[Grade]:
        """The grades of problems' answers, in order. No answer (None), one of more than `LONGEST_ANSWER` characters and
        one that its grader cannot stand within the limits score 0. If it raises, the pool is closed."""
        grades = [self._ungraded[problem.task] for problem, _ in items]
        waiting = deque(i for i, (_, text) in enumerate(items) if text is not None and len(text) <= LONGEST_ANSWER)
        tried: set[int] = set()
        try:
            while waiting or any(worker.asked for worker in self._workers):
                for worker in self._workers:
                    if worker.ready and not worker.asked and waiting:
                        size = min(_BATCH, -(-len(waiting) // len(self._workers)))
                        worker.ask([waiting.popleft() for _ in range(size)], items, self._patience)
                self._advance(grades, waiting, tried)
        except BaseException:  # grades under way must not be taken for those of the next call
            self.close()
            raise
        return grades

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.end()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _advance(self, grades: list[Grade], waiting: deque[int], tried: set[int]) -> None:
        """Wait until something happens, and take note of it."""
        busy = [worker for worker in self._workers if worker.asked or not worker.ready]
        timeout = min((worker.deadline for worker in busy), default=0.0) - time.monotonic()
        if wait([worker.connection for worker in self._workers], max(timeout, 0.0)):
            time.sleep(_GATHER_SECONDS)
        heard = [worker for worker in self._workers if worker.connection.poll()]
        for worker in heard:
            for i, grade in worker.read(self._patience):
                grades[i] = grade
        now = time.monotonic()
        # One that has just been heard is not late, however long this process itself was held up.
        for worker in [w for w in busy if w not in heard and now > w.deadline]:
            worker.process.kill()
        for worker in heard:
            if worker.ended:
                self._replace(worker, waiting, tried)

    def _replace(self, worker: "_Worker", waiting: deque[int], tried: set[int]) -> None:
        """Start a dead process again. What it was at scores 0; the rest of its batch goes back to the queue's head.

        Death by its own limit of time is the answer's fault. After any other death (a crash, the system's lack of
        memory, a machine that stood still) the answer has a second try, so that no accident makes it wrong.
        """
        died_of, unfinished = worker.end(), list(worker.asked)
        if unfinished:
            first = unfinished[0]
            if died_of in (-signal.SIGPROF, -signal.SIGXCPU) or first in tried:
                unfinished = unfinished[1:]
            tried.add(first)
        waiting.extendleft(reversed(unfinished))
        worker.start()


class _Worker:
    """One process, and what it has been asked."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = setup
        self._failed_starts = 0
        self.asked: deque[int] = deque()
        self.start()

    def start(self) -> None:
        """Returns at once; the process is `ready` when it says so."""
        # As few threads as possible: each reserves memory that counts against the limit.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        path = os.pathsep.join(filter(None, sys.path))
        self.connection, its_end = Pipe()
        with its_end:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mai_thinking.rl.grading_worker", str(its_end.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **threads, "PYTHONPATH": path},
                pass_fds=[its_end.fileno()],
                start_new_session=True,  # Ctrl-C is for the trainer
            )
        self.asked.clear()
        self.ready = self.ended = False
        self.deadline = time.monotonic() + _START_SECONDS
        self._send(self._setup)

    def ask(self, indices: Sequence[int], items: Sequence[_Item], patience: float) -> None:
        """Send a batch. Each problem goes once, however many answers it has."""
        places: dict[Problem, int] = {}
        rows = [(places.setdefault(items[i][0], len(places)), items[i][1]) for i in indices]
        self.asked.extend(indices)
        self.deadline = time.monotonic() + patience
        self._send({"problems": [asdict(problem) for problem in places], "items": rows})

    def read(self, patience: float) -> list[tuple[int, Grade]]:
        """What has come: items and their grades. Sets `ready` and `ended`."""
        found = []
        try:
            while self.connection.poll():
                message = json.loads(self.connection.recv_bytes())
                if self.ready:
                    score, passed, gate_failed, tie_breakers = message
                    found.append((self.asked.popleft(), Grade(score, passed, gate_failed, tuple(tie_breakers))))
                elif message is not None:
                    raise UsageError(message)
                else:
                    self.ready, self._failed_starts = True, 0
        except (EOFError, OSError):
            self.ended = True
        self.deadline = time.monotonic() + patience if self.ready else self.deadline
        return found

    def end(self) -> int:
        """Kill the process if it lives; its exit code, negative if a signal ended it. Raises RunError if it died at its
        start too often."""
        if not self.ended:
            self.process.kill()
        code = self.process.wait()
        self.connection.close()
        if self.ended and not self.ready:
            self._failed_starts += 1
            if self._failed_starts == _FAILED_STARTS:
                raise RunError(f"the grading process dies at its start (exit code {code}); its last words are above")
        return code

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # it is dead, and its connection, at an end, will say so
            self.connection.send_bytes(json.dumps(message).encode())
