"""The tasks of a run, and which problem comes when."""

import random
from collections.abc import Callable, Sequence

from mai_thinking.config.names import nearest_name
from mai_thinking.config.tasks import SERIAL, TaskSection
from mai_thinking.data.questions import Split
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks.base import Problem, Task
from mai_thinking.rl.tasks.gym import GymTask
from mai_thinking.rl.tasks.jsonl import JsonlTask
from mai_thinking.rl.tasks.procedural import ProceduralTask, SerialTask
from mai_thinking.rl.tasks.repair import RepairTask
from mai_thinking.rl.tasks.verifiers import VerifiersTask

_PROBED = 64
"""Problems of each split that are looked at before a run, where there is no end of them."""
_PATIENCE = 500
"""Problems in a row that bring no new question before a split counts as seen whole."""


def make_task(section: TaskSection) -> Task:
    """The task of a section. Raises UsageError if it cannot be had."""
    kinds: dict[str, Callable[[TaskSection], Task]] = {
        "reasoning-gym": GymTask, "verifiers": VerifiersTask, "repair": RepairTask, "jsonl": JsonlTask,
        **dict.fromkeys(SERIAL, SerialTask),
    }  # fmt: skip
    return kinds.get(section.kind, ProceduralTask)(section)


class TaskSampler:
    """Draws problems from several tasks by weight."""

    def __init__(self, sections: Sequence[TaskSection], seed: int) -> None:
        """Raises UsageError if there is no task, two have one name, or a task lacks a split."""
        names = [section.name for section in sections]
        if not names:
            raise UsageError("there is no task to train on; list some under `tasks`")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"two tasks are called {twice!r}; give each its own name")
        self.seed = seed
        self.fits: Callable[[Problem], bool] = lambda problem: True
        """Which problems are drawn; the others are passed over."""
        self.notes: list[str] = []
        """What was left out, a line each."""
        self._weights = [section.weight for section in sections]
        self._tasks = {section.name: make_task(section) for section in sections}
        for task in self._tasks.values():  # early, rather than hours into the run
            task.problem("train", 0)
            task.problem("held_out", 0)
            self.notes += task.notes

    @property
    def families(self) -> list[str]:
        """The tasks' names, in the config's order."""
        return list(self._tasks)

    def task(self, name: str) -> Task:
        """The task of that name. Raises UsageError if there is none."""
        if name not in self._tasks:
            raise UsageError(f"there is no task {name!r}; {nearest_name(name, self._tasks)}")
        return self._tasks[name]

    def problem(self, split: Split, n: int) -> Problem:
        """Problem `n` (0, 1, 2, …) of the run: a function of (seed, split, n) alone, so that a run can go on from any
        n. Drawn with replacement: a problem may come again. UsageError if none is found that `fits`."""
        rng = random.Random(f"{self.seed} {split} {n}")
        for _ in range(_PATIENCE):
            (name,) = rng.choices(list(self._tasks), self._weights)
            problem = self._tasks[name].problem(split, rng.getrandbits(40))
            if self.fits(problem):
                return problem
        raise UsageError(f"of {_PATIENCE} problems drawn none fits into a row; raise packing.row_length")

    def probe(self, family: str, split: Split) -> list[Problem]:
        """All problems of a task that has so many and no more; the first of an endless one."""
        task = self.task(family)
        return task.problems[split] if isinstance(task, JsonlTask) else [task.problem(split, n) for n in range(_PROBED)]

    def held_out(self, family: str, count: int) -> list[Problem]:
        """The first `count` distinct held-out problems of a task, whatever the seed; fewer if it has no more."""
        task, found, index, last_new = self.task(family), dict[str, Problem](), 0, 0
        while len(found) < count and index - last_new <= _PATIENCE:
            problem = task.problem("held_out", index)
            if problem.id not in found and self.fits(problem):
                found[problem.id], last_new = problem, index
            index += 1
        return list(found.values())
