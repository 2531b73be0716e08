"""Small programs with one fault, to be repaired: graded by what they do with inputs that the question does not show.

MAI-Thinking-1 report §3.3, App. D. The inputs go to the repaired program when it is graded, and what it should make of
them never does: nothing that a program does to its surroundings can make it pass.
"""

import random
import re
from dataclasses import dataclass

from mai_thinking.config.tasks import TaskSection
from mai_thinking.data.questions import Split, split_of
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks.base import Problem, Task
from mai_thinking.rl.tools.sandbox import isolation, run_python

_LOOP = "def f(numbers):\n    {start}\n    for n in numbers:\n{body}\n    return {end}"
_GOLDEN = (
    _LOOP.format(start="total = {a}", body="        if n > {b}:\n            total += n", end="total"),
    _LOOP.format(start="best = 99", body="        if n < best:\n            best = n", end="best * {a} + {b}"),
    _LOOP.format(start="count = {b}", body="        if n % {a} == 0:\n            count += 1", end="count"),
    _LOOP.format(start="result = {a}", body="        result += n * {a} - {b}", end="result"),
)
"""Functions of a list of whole numbers, with two constants."""
_FAULTS = (
    (" > ", " < "), (" < ", " > "), ("+= n", "-= n"), ("+= 1", "+= 2"), (" == 0", " != 0"), (" * ", " + "),
    (" - ", " + "),
)  # fmt: skip
_SHOWN, _HIDDEN = 2, 6
"""Inputs in the question, and others that it is graded with."""
_SECONDS, _MEGABYTES = 2.0, 256
_TRIES = 3
"""How often the right program must pass and the empty one fail before an environment is used."""


@dataclass(frozen=True)
class _Program:
    golden: str
    faulty: str
    shown: list[list[int]]
    hidden: list[list[int]]


class RepairTask(Task):
    """Programs to repair. UsageError unless the right program passes and the empty one fails, each of three times."""

    def __init__(self, section: TaskSection) -> None:
        super().__init__(section)
        self.notes = [isolation()] if isolation() else []
        problem, golden = self.problem("train", 0), self.golden("train", 0)
        for _ in range(_TRIES):
            if self.verify(problem, golden) != 1 or self.verify(problem, "") != 0 or self.verify(problem, "pass") != 0:
                raise UsageError(f"task {self.name!r}: programs cannot be graded on this machine; leave the task out")

    def problem(self, split: Split, index: int) -> Problem:
        number, question = self._number(split, index)
        program = _program(number)
        return self.made(question, " ".join(map(str, _run(program.golden, program.hidden))), item=number)

    def golden(self, split: Split, index: int) -> str:
        """The program without its fault."""
        return _program(self._number(split, index)[0]).golden

    def verify(self, problem: Problem, answer: str) -> float:
        """Runs the answer, in a sandbox, on the hidden inputs: 1 if it makes of each what it should."""
        program = re.sub(r"\A```(?:python)?\n|\n```\Z", "", answer.strip())
        inputs = _program(problem.item).hidden
        # Written behind the program, anew for each grading: there is nothing of the tests that it could change.
        tests = f"\nimport sys\nfor case in {inputs}:\n    print(f(case), file=sys.__stdout__)\n"
        outcome = run_python(program + tests, seconds=_SECONDS, megabytes=_MEGABYTES, locked=not isolation())
        return float(not outcome.failed and outcome.output.split() == problem.answer.split())

    def _number(self, split: Split, index: int) -> tuple[int, str]:
        """Of the program, and its question, which is of the split."""
        attempt = 0
        while True:
            number = random.Random(f"repair {index} {attempt}").getrandbits(40)
            program = _program(number)
            results = _run(program.golden, program.shown)
            examples = ", ".join(f"f({case}) = {result}" for case, result in zip(program.shown, results, strict=True))
            question = f"Repair this program, so that {examples}:\n{program.faulty}"
            shows = _run(program.faulty, program.hidden) != _run(program.golden, program.hidden)
            if shows and split_of(question) == split:
                return number, question
            attempt += 1


def _program(number: int) -> _Program:
    """A function of its number."""
    rng = random.Random(f"program {number}")
    golden = rng.choice(_GOLDEN).format(a=rng.randint(2, 9), b=rng.randint(1, 9))
    right, wrong = rng.choice([fault for fault in _FAULTS if fault[0] in golden])
    cases = [[rng.randint(0, 20) for _ in range(rng.randint(2, 5))] for _ in range(_SHOWN + _HIDDEN)]
    return _Program(golden, golden.replace(right, wrong, 1), cases[:_SHOWN], cases[_SHOWN:])


def _run(program: str, cases: list[list[int]]) -> list[int]:
    """Of our own programs, which need no sandbox."""
    names: dict[str, object] = {}
    exec(program, names)
    function = names["f"]
    assert callable(function)
    return [function(list(case)) for case in cases]
