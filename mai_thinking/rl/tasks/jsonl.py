"""Questions and answers from a JSONL file, GSM8K's for one; graded as text or as mathematics (extra `tasks`)."""

import json
import re
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from mai_thinking.config.tasks import TaskSection
from mai_thinking.data.questions import Split, question_id, split_of
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks.base import Problem, same_text

_LONGEST_EXPRESSION = 300
"""Characters of an answer that is taken for mathematics."""


class JsonlTask:
    """Problem `index` is line `index` of its split, over and over; both splits come from the one file."""

    def __init__(self, section: TaskSection) -> None:
        """Raises UsageError if the file cannot be used, or math-verify is needed and missing."""
        assert section.path is not None, "the section's validator sees to it"
        self.name, self._path, self._grading = section.name, Path(section.path), section.grading
        self._problems: dict[Split, list[Problem]] = {"train": [], "held_out": []}
        seen: set[str] = set()
        for number, row in enumerate(self._rows()):
            problem = self._read(section, number, row)
            if problem.id not in seen:
                seen.add(problem.id)
                self._problems[split_of(problem.question)].append(problem)
        if self._grading == "math" and any(
            _number(problem.answer) is None for problems in self._problems.values() for problem in problems
        ):
            require_math_verify(self.name)

    def problem(self, split: Split, index: int) -> Problem:
        """See `Task.problem`."""
        problems = self._problems[split]
        if not problems:
            raise UsageError(
                f"task {self.name!r} has no {split.replace('_', '-')} question: {self._path} is too small; "
                "add questions to it, or remove the task"
            )
        return problems[index % len(problems)]

    def verify(self, problem: Problem, answer: str) -> float:
        """See `Task.verify`. By `math`, a number must be written out, as `1,234.50`, `1/2` or `\\frac{1}{2}`: a sum
        that comes to it was not worked out. Only a reference that is no number goes to math-verify."""
        if same_text(problem.answer, answer):
            return 1.0
        if self._grading == "exact" or len(answer) > _LONGEST_EXPRESSION:
            return 0.0
        reference = _number(problem.answer)
        if reference is not None:
            return float(_number(answer) == reference)
        return float(_same_mathematics(problem.answer, answer))

    def _rows(self) -> list[Any]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"task {self.name!r}: cannot read {self._path}: {error}") from None
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line) if line.strip() else None)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{self._path}, line {number}: not JSON ({error}); mend or remove the line") from None
        return [row for row in rows if row is not None]

    def _read(self, section: TaskSection, number: int, row: Any) -> Problem:
        texts = []
        for option, field in (("question_field", section.question_field), ("answer_field", section.answer_field)):
            value = row.get(field) if isinstance(row, dict) else None
            if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
                raise UsageError(
                    f"{self._path}, record {number + 1}: no text in field {field!r}; name the right one in `{option}`"
                )
            texts.append(str(value))
        question, answer = texts[0].strip(), texts[1].rpartition("####")[2].strip()
        if not answer:
            raise UsageError(f"{self._path}, record {number + 1}: nothing after `####`; mend or remove the line")
        return Problem(self.name, question_id(question), question, answer, difficulty=0.5, item=number)


def require_math_verify(name: str) -> None:
    """Raise UsageError if math-verify is not installed."""
    try:
        import math_verify  # noqa: F401

        _parse("x")  # builds its grammar: not on the first answer's time
    except ImportError:
        raise UsageError(
            f"task {name!r} needs math-verify: pip install 'mai_thinking[tasks]', or set `grading: exact`"
        ) from None


_LONGEST_NUMBER = 100
_NUMBER = re.compile(r"\$?([-+]?)\$?((?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]*|0)(?:\.[0-9]+)?)(?:/([0-9]+))? ?%?")
_WRAPPED = re.compile(r"\$(.+)\$|\\\((.+)\\\)|\\boxed\{(.+)\}")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")


def _number(text: str) -> Fraction | None:
    """The number that is the whole of `text`, in ASCII digits, with thousands' commas, $ or % or not; else None. A
    fraction must be in lowest terms: 36/2 is no way to write 18."""
    text = _unwrapped(text.strip().removesuffix("."))
    match = _NUMBER.fullmatch(_FRACTION.sub(r"\1\2/\3", text).replace(r"\$", "$").replace(r"\%", "%"))
    if not match or len(text) > _LONGEST_NUMBER:
        return None
    sign, top, bottom = match.groups()
    value = Fraction(top.replace(",", ""))
    if bottom is not None:
        if int(bottom) < 2 or (value / int(bottom)).denominator != int(bottom):
            return None
        value /= int(bottom)
    return -value if sign == "-" else value


def _unwrapped(text: str) -> str:
    """`text` without $…$, \\(…\\) and \\boxed{…} around it."""
    while wrapped := _WRAPPED.fullmatch(text):
        text = next(part for part in wrapped.groups() if part is not None).strip()
    return text


@lru_cache(maxsize=1024)
def _parsed(reference: str) -> list[Any]:
    return _parse(reference)


def _parse(text: str) -> list[Any]:
    """math-verify's reading of an expression; [] if it has none. No time limit of its own: that would set an alarm."""
    from math_verify import LatexExtractionConfig, parse

    bare = _unwrapped(text.strip())
    # One expression that is the whole answer: a text with formulas of its own could hold several, of which any may fit.
    if not bare or re.search(r"[$\n]|\\boxed|\\\(|\\\[", bare) or bare.count("{") != bare.count("}"):
        return []
    return parse(f"${bare}$", [LatexExtractionConfig()], parsing_timeout=None)


def _same_mathematics(reference: str, answer: str) -> bool:
    from math_verify import verify

    try:
        answered = _parse(answer)
        return bool(answered) and verify(_parsed(reference), answered, timeout_seconds=None)
    except Exception:  # the parsers raise all kinds of errors on text that is no mathematics
        return False
