"""Tasksets of the library `verifiers` (0.4) as tasks: a prompt, an answer, and the taskset's own rewards.

The library is no extra of ours, since it pins other libraries' versions; the taskset's package is installed beside it.
A taskset whose tasks need a container, tool servers or a judge is refused: what is graded is one answer, in the grading
process. Splits go by the prompt's text, as everywhere.
"""

import asyncio
from itertools import islice
from typing import Any

from mai_thinking.config.tasks import TaskSection
from mai_thinking.data.questions import Split, split_of
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks.base import Problem, Task

_MOST = 20_000
"""Tasks of a taskset; some have no end."""


class VerifiersTask(Task):
    """One taskset, with its config's options."""

    def __init__(self, section: TaskSection) -> None:
        """Raises UsageError if the library is missing, or the taskset, or what we can grade of it."""
        super().__init__(section)
        try:
            import verifiers.v1 as vf
            from verifiers.v1.utils.loaders import load_taskset, taskset_config_type
        except ImportError:
            raise UsageError(f"task {self.name!r} needs verifiers: pip install verifiers, or remove the task") from None
        self._vf: Any = vf
        try:
            config = taskset_config_type(section.dataset)(id=section.dataset, **section.options)
            self._tasks = list(islice(load_taskset(config), _MOST))
        except (ImportError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"task {self.name!r}: no such taskset, or other `options`: {error}") from None
        for task in self._tasks[:1]:
            if task.NEEDS_CONTAINER or task.toolsets(task.config) or task.plugged_judges():
                raise UsageError(f"task {self.name!r}: a container, tools or a judge is needed; take another")
        self._places: dict[Split, list[int]] = {"train": [], "held_out": []}
        for place, task in enumerate(self._tasks):
            self._places[split_of(task.data.prompt_text)].append(place)

    def problem(self, split: Split, index: int) -> Problem:
        if not (places := self._places[split]):
            raise self.lacks(split, f" among its {len(self._tasks):,} tasks; take a larger taskset")
        data = self._tasks[places[index % len(places)]].data
        return self.made(data.prompt_text, str(getattr(data, "answer", "")), item=places[index % len(places)])

    def verify(self, problem: Problem, answer: str) -> float:
        """The sum of the task's weighted rewards, within 0 to 1. For a grading process only."""
        vf, task = self._vf, self._tasks[problem.item]
        asked = vf.MessageNode(message=vf.UserMessage(content=problem.question))
        given = vf.MessageNode(message=vf.AssistantMessage(content=answer), parent=0, sampled=True)
        record = vf.TraceTask(type=type(task).__name__, data=task.data)
        try:
            trace = vf.Trace(task=record, agent=vf.AgentInfo(config=vf.AgentConfig()), nodes=[asked, given])
            asyncio.run(task.score(trace))
            return min(1.0, max(0.0, float(trace.reward)))
        except Exception:  # rewards raise all kinds of errors on text that is no answer
            return 0.0
