"""Families of problems made by rule, in the plain words of the embedded exercises. MAI-Thinking-1 report §3.1.

A family draws a question and its answer from a generator; `digits` and `length` bound the sizes. Verification is
equality of text, so nothing that a model writes is ever evaluated.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from mai_thinking.config.tasks import LISTS, SerialFamily
from mai_thinking.data.questions import Split, split_of
from mai_thinking.data.serial import serial_problem
from mai_thinking.rl.tasks.base import Problem, Task

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


class ProceduralTask(Task):
    """One of the families, with the sizes of its section. The name of the task plays no part: the same options give the
    same problems."""

    def problem(self, split: Split, index: int) -> Problem:
        kind, digits, length = self.section.kind, self.section.digits or (1, 2), self.section.length or _LENGTH
        for attempt in range(_ATTEMPTS):
            draw = _Sizes(random.Random(f"{kind} {digits} {length} {index} {attempt}"), digits, length)
            question, answer = _DRAWS[kind](draw)
            if split_of(question) == split:
                return self.made(question, answer, size=draw.items)
        options = "`digits` or `length`" if kind in LISTS else "`digits`"
        raise self.lacks(split, f" among {_ATTEMPTS:,} drawn; raise {options}")


class SerialTask(Task):
    """One of the families of `mai_thinking.data.serial`: the questions of its exercises, apart by the hash of their
    text. Sizes are drawn evenly."""

    def problem(self, split: Split, index: int) -> Problem:
        kind, length = self.section.kind, self.section.length or _LENGTH
        rng = random.Random(f"{kind} {length} {split} {index}")
        size = rng.randint(*length)
        drawn = serial_problem(cast(SerialFamily, kind), size, rng, split)
        return self.made(drawn.question, drawn.answer, size=size)
