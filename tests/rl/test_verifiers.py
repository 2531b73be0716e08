"""A taskset of the library verifiers as a task. It is no extra of ours: where it is missing, the guard is tried."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.config.tasks import TaskSection
from mai_thinking.data.questions import split_of
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks import Task, make_task

INSTALLED = importlib.util.find_spec("verifiers") is not None
TASKSET = """
import verifiers.v1 as vf

class Row(vf.TaskData):
    answer: str

class Double(vf.Task[Row]):
    NEEDS_CONTAINER = BOXED

    @vf.reward(weight=1.0)
    async def right(self, task, trace) -> float:
        if trace.last_reply == "crash":
            raise ValueError("no number")
        return float(trace.last_reply == task.answer)

    @vf.reward(weight=0.5)
    async def number(self, trace) -> float:
        return float(trace.last_reply.isdigit())

class Doubles(vf.Taskset[Double, vf.TasksetConfig]):
    def load(self):
        for n in range(100):
            yield Double(Row(prompt=f"Double {n}.", answer=str(2 * n)), self.config.task)

__all__ = ["Doubles"]
"""


def task(dataset: str) -> Task:
    return make_task(TaskSection(name="double", kind="verifiers", dataset=dataset))


@pytest.fixture
def taskset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("verifiers")
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, boxed: bool) -> str:
        (tmp_path / f"{name}.py").write_text(TASKSET.replace("BOXED", str(boxed)))
        return name

    return write


@pytest.mark.skipif(INSTALLED, reason="verifiers is there")
def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="pip install verifiers"):
        task("double")


def test_its_own_rewards_grade_and_splits_go_by_the_prompt(taskset: Any) -> None:
    doubles = task(taskset("doubles", boxed=False))
    for split in ("train", "held_out"):
        problems = [doubles.problem(split, index) for index in range(10)]
        assert len({problem.id for problem in problems}) == 10
        for problem in problems:
            assert split_of(problem.question) == split
            number = int(problem.question.removeprefix("Double ").removesuffix("."))
            assert problem.answer == str(2 * number)
            assert doubles.verify(problem, problem.answer) == 1  # of 1.5 that it pays at most
            assert doubles.verify(problem, f"{problem.answer}1") == 0.5
            assert doubles.verify(problem, "two") == doubles.verify(problem, "crash") == 0


def test_what_needs_a_container_or_is_not_there_is_refused(taskset: Any) -> None:
    with pytest.raises(UsageError, match="a container, tools or a judge is needed"):
        task(taskset("boxed", boxed=True))
    with pytest.raises(UsageError, match="no such taskset"):
        task("nothing_of_this_name")
