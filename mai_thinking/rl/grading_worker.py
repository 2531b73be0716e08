"""A process that grades answers: started by `mai_thinking.rl.grading`, never by hand. Imports no torch.

It talks JSON over the connection whose file descriptor it is given. In: the tasks' sections and the limits; then
batches `{"problems": […], "items": [[which problem, answer], …]}`. Out: null when it is ready, or what is wrong with a
task; then each item's `Grade`, as soon as it is known.
"""

import json
import math
import os
import re
import resource
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mai_thinking.config.tasks import TaskSection
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks import WRONG, Grade, Problem, make_task
from mai_thinking.rl.tasks.base import combine, no_grade
from mai_thinking.training.process import die_with_parent


class Grader:
    """A task's own verifier and the further graders of its section."""

    def __init__(self, section: TaskSection) -> None:
        self._task = make_task(section)
        self._patterns = [re.compile(grader.pattern) for grader in section.graders]
        self.section = section

    def grade(self, problem: Problem, answer: str) -> Grade:
        """The combined grade; what is no score (NaN, say) counts as 0."""
        verified = self._task.verify(problem, answer)
        score, passed = verified if isinstance(verified, tuple) else (verified, verified == 1)
        text, own = answer.strip(), Grade(score, passed) if 0 <= score <= 1 else WRONG
        return combine(own, [pattern.fullmatch(text) is not None for pattern in self._patterns], self.section)


def main() -> None:
    trainer = Connection(int(sys.argv[1]))
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the trainer, told to stop, still has its last step graded
    setup = json.loads(trainer.recv_bytes())
    try:
        graders = {fields["name"]: Grader(TaskSection(**fields)) for fields in setup["tasks"]}
    except UsageError as error:
        _send(trainer, str(error))
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)  # for what graders print
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    _limit(setup["megabytes"], processes=any(task["kind"] == "repair" for task in setup["tasks"]))
    _send(trainer, None)
    with suppress(EOFError):  # the pool is closed
        while True:
            batch = json.loads(trainer.recv_bytes())
            problems = [Problem(**fields) for fields in batch["problems"]]
            for which, answer in batch["items"]:
                problem = problems[which]
                _send(trainer, _grade(graders[problem.task], problem, answer, setup["seconds"]))


def _send(trainer: Connection, message: Any) -> None:
    trainer.send_bytes(json.dumps(message).encode())


def _grade(grader: Grader, problem: Problem, answer: str, seconds: float) -> Grade:
    """In `seconds` of processor time."""
    # The kernel ends the process, whatever code it is in: Python's own handlers wait for the end of an instruction, and
    # 9**9**9 is one. The second limit is for code that would stop the clock.
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds) + 1, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        grade = grader.grade(problem, answer)
    except Exception:  # MemoryError and RecursionError too: such an answer is wrong
        grade = no_grade(grader.section)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return grade


def _limit(megabytes: int, *, processes: bool) -> None:
    """No more memory than `megabytes` beyond what is in use, no files written, no core dumps, and no processes started
    but the sandboxes of tasks that have programs graded."""
    with suppress(OSError):  # only Linux tells
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    limits = (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, *(() if processes else (resource.RLIMIT_NPROC,)))
    for limit in limits:
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (0, 0))


if __name__ == "__main__":
    main()
