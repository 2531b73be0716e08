"""What a task is, and when two answers are the same. Its held-out problems: `mai_thinking.data.questions`."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mai_thinking.config.tasks import TaskSection
from mai_thinking.data.questions import Split, question_id
from mai_thinking.errors import UsageError

LONGEST_ANSWER = 10_000
"""Characters; a longer answer is wrong, unread."""


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer."""

    task: str
    """The task's name in the config."""
    id: str
    """Hash of the question's text: 16 hexadecimal digits."""
    question: str
    answer: str
    """The reference, as text."""
    size: int = 0
    """Items in the question, where the task counts them; 0 elsewhere."""
    item: int = 0
    """Number in the task's source, for a verifier that needs more than the reference."""


class Grade(NamedTuple):
    """What the graders of a task say of one answer (report §3.6.3)."""

    score: float
    """0 to 1: R_task."""
    passed: bool
    """The verdict, which pass rates count. A positive score is none: half of it may be for the form."""
    gate_failed: bool = False
    """The rollout gets the least reward, whatever else it earned."""
    tie_breakers: tuple[float, ...] = ()
    """Further scores, which count where the whole group ties on the first."""


WRONG = Grade(0.0, False)


def combine(own: Grade, matches: Sequence[bool], section: TaskSection) -> Grade:
    """One grade of the task's own and of whether `section.graders` match, by `section.combination`:

    - `sum`: the mean of the scores by their weights; the verdict is the task's own.
    - `gate`: the task's own, if all graders match; else the least (§3.1: safety gates rather than adds).
    - `lexicographic`: the task's own; the graders, the most important first, break ties of a whole group.

    A grader with `passes` passes an answer too.
    """
    own = own._replace(passed=own.passed or any(m and g.passes for m, g in zip(matches, section.graders, strict=True)))
    if section.combination == "gate":
        return own if all(matches) else no_grade(section)
    if section.combination == "lexicographic":
        return own._replace(tie_breakers=tuple(map(float, matches)))
    weights = [1.0, *(grader.weight for grader in section.graders)]
    scores = [own.score, *map(float, matches)]
    return own._replace(score=sum(w * score for w, score in zip(weights, scores, strict=True)) / sum(weights))


def no_grade(section: TaskSection) -> Grade:
    """Of what could not be graded, such as no answer: wrong, and through no gate."""
    return WRONG._replace(gate_failed=section.combination == "gate" and bool(section.graders))


class Task(ABC):
    """A family of problems with a verifier."""

    notes: Sequence[str] = ()
    """What was left out, a line each."""

    def __init__(self, section: TaskSection) -> None:
        self.name, self.section = section.name, section

    @abstractmethod
    def problem(self, split: Split, index: int) -> Problem:
        """Problem `index` (0, 1, 2, …) of a split: a function of the task's section and the arguments alone. Different
        indices may give the same problem. Raises UsageError if the split is empty."""

    def verify(self, problem: Problem, answer: str) -> float | tuple[float, bool]:
        """0 (wrong) to 1 (right), and, unless only 1 passes, whether the answer passes; here: 1 for the reference as
        text. Never raises, on any text. Fast on any text too for the procedural tasks; for others the grading process
        has the limits."""
        return float(same_text(problem.answer, answer))

    def made(self, question: str, answer: str, *, size: int = 0, item: int = 0) -> Problem:
        """One of this task's problems."""
        return Problem(self.name, question_id(question), question, answer, size, item)

    def lacks(self, split: Split, where: str) -> UsageError:
        """What to raise where a split is empty; `where` one looked, and the fix."""
        return UsageError(f"task {self.name!r} has no {split.replace('_', '-')} question{where}")


_SPACE = re.compile(r"[ \t\r\n]+")
_COMMA = re.compile(r" ?, ?")


def normalise(answer: str) -> str:
    """`answer` without white space around it and around commas, and without one full stop at the end. Nothing else:
    `07`, `+7` and digits of other scripts are not `7`."""
    text = _COMMA.sub(", ", _SPACE.sub(" ", answer).strip(" "))
    return text[:-1].rstrip(" ") if text.endswith(".") else text


def same_text(reference: str, answer: str) -> bool:
    """Whether `answer` is `reference` but for what `normalise` takes away."""
    return len(answer) <= LONGEST_ANSWER and normalise(answer) == normalise(reference)
