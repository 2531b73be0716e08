"""Families of problems made by rule, in the plain words of the embedded exercises. MAI-Thinking-1 report §3.1.

A family draws a question and its answer from a generator; `digits` and `length` bound the sizes. Verification is
equality of text, so nothing that a model writes is ever evaluated.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from mai_thinking.config.tasks import LISTS, SERIAL, TaskSection
from mai_thinking.data.questions import Split, question_id, split_of
from mai_thinking.data.serial import serial_problem
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks.base import Problem, same_text

_LENGTH = (3, 6)
_ATTEMPTS = 2_000
"""Draws before a split counts as empty. Were 1 % of the draws of that split, 2,000 would miss it once in 5·10^8."""


@dataclass
class _Sizes:
    """Draws numbers and lengths within the options, and keeps the length of the list."""

    rng: random.Random
    digits: tuple[int, int]
    length: tuple[int, int]
    items: int = 0

    def number(self) -> int:
        """Of `digits` digits, each count as likely as the others; 0 has one digit."""
        size = self.rng.randint(*self.digits)
        return self.rng.randint(10 ** (size - 1) if size > 1 else 0, 10**size - 1)

    def size(self) -> int:
        """Of a list."""
        self.items = self.rng.randint(*self.length)
        return self.items

    def numbers(self) -> list[int]:
        return [self.number() for _ in range(self.size())]


_Drawn = tuple[str, str]
"""Question and answer."""


def _sum(draw: _Sizes) -> _Drawn:
    a, b = draw.number(), draw.number()
    return f"What is {a} + {b}?", str(a + b)


def _difference(draw: _Sizes) -> _Drawn:
    a, b = draw.number(), draw.number()
    return f"What is {a} - {b}?", str(a - b)


def _largest(draw: _Sizes) -> _Drawn:
    numbers = draw.numbers()
    return f"Which is the largest of {_listed(numbers)}?", str(max(numbers))


def _count(draw: _Sizes) -> _Drawn:
    numbers = draw.numbers()
    # Chosen places rather than chance, so that every count from none to all is as likely.
    wanted, count = draw.number(), draw.rng.randint(0, len(numbers))
    for place in draw.rng.sample(range(len(numbers)), count):
        numbers[place] = wanted
    return f"How often does {wanted} occur in {_listed(numbers)}?", str(numbers.count(wanted))


def _position(draw: _Sizes) -> _Drawn:
    numbers = draw.numbers()
    place = draw.rng.randint(1, len(numbers))
    return f"Which is number {place} of {_listed(numbers)}?", str(numbers[place - 1])


def _sort(draw: _Sizes) -> _Drawn:
    numbers = draw.numbers()
    return f"Sort {_listed(numbers)}.", _listed(sorted(numbers))


def _next(draw: _Sizes) -> _Drawn:
    start, step = draw.number(), draw.number() * draw.rng.choice((1, -1))
    shown = draw.size()
    numbers = [start + step * i for i in range(shown)]
    return f"What comes next: {_listed(numbers)}?", str(start + step * shown)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


_DRAWS: dict[str, Callable[[_Sizes], _Drawn]] = {
    "sum": _sum,
    "difference": _difference,
    "largest": _largest,
    "count": _count,
    "position": _position,
    "sort": _sort,
    "next": _next,
}


class ProceduralTask:
    """One of the families, with the sizes of its section."""

    def __init__(self, section: TaskSection) -> None:
        self.name, self._family = section.name, section.kind
        self._digits = section.digits or (1, 2)
        self._length = section.length or _LENGTH

    def problem(self, split: Split, index: int) -> Problem:
        """See `Task.problem`. The name of the task plays no part: the same options give the same problems."""
        for attempt in range(_ATTEMPTS):
            rng = random.Random(f"{self._family} {self._digits} {self._length} {index} {attempt}")
            draw = _Sizes(rng, self._digits, self._length)
            question, answer = _DRAWS[self._family](draw)
            if split_of(question) == split:
                return Problem(self.name, question_id(question), question, answer, size=draw.items)
        options = "`digits` or `length`" if self._family in LISTS else "`digits`"
        raise UsageError(
            f"task {self.name!r} has no {split.replace('_', '-')} question among {_ATTEMPTS:,} drawn; raise {options}"
        )

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Task.verify`: 1 for the reference as text, 0 for everything else."""
        return float(same_text(problem.answer, answer))


class SerialTask(ProceduralTask):
    """One of the families of `mai_thinking.data.serial`: the questions of its exercises, apart by the hash of their
    text."""

    def problem(self, split: Split, index: int) -> Problem:
        """See `Task.problem`. Sizes are drawn evenly."""
        rng = random.Random(f"{self._family} {self._length} {split} {index}")
        size = rng.randint(*self._length)
        family = next(family for family in SERIAL if family == self._family)
        made = serial_problem(family, size, rng, split)
        return Problem(self.name, question_id(made.question), made.question, made.answer, size=size)
