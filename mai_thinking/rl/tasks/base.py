"""What a task is, and when two answers are the same. Its held-out problems: `mai_thinking.data.questions`."""

import re
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mai_thinking.data.questions import Split

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


class Task(Protocol):
    """A family of problems with a verifier."""

    name: str

    def problem(self, split: Split, index: int) -> Problem:
        """Problem `index` (0, 1, 2, …) of a split: a function of the task's section and the arguments alone. Different
        indices may give the same problem. Raises UsageError if the split is empty."""
        ...

    def verify(self, problem: Problem, answer: str) -> float | tuple[float, bool]:
        """0 (wrong) to 1 (right), and, unless only 1 passes, whether the answer passes. Never raises, on any text. Fast
        on any text too for the procedural tasks; for others the grading process has the limits."""
        ...


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
