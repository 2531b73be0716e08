"""Questions and answers from a JSONL file, GSM8K's for one; graded as text or as mathematics."""

import json
from pathlib import Path
from typing import Any

from mai_thinking.config.tasks import TaskSection
from mai_thinking.data.questions import Split, question_id, split_of
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks.base import Problem, same_text
from mai_thinking.rl.tasks.mathematics import same_mathematics


class JsonlTask:
    """Problem `index` is line `index` of its split, over and over; both splits come from the one file."""

    def __init__(self, section: TaskSection) -> None:
        """Raises UsageError if the file cannot be used."""
        assert section.path is not None, "the section's validator sees to it"
        self.name, self._path, self._grading = section.name, Path(section.path), section.grading
        self._problems: dict[Split, list[Problem]] = {"train": [], "held_out": []}
        seen: set[str] = set()
        for number, row in enumerate(self._rows()):
            problem = self._read(section, number, row)
            if problem.id not in seen:
                seen.add(problem.id)
                self._problems[split_of(problem.question)].append(problem)

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
        """See `Task.verify`: 1 if the answer is the reference as text or, by `math`, as mathematics."""
        right = same_text(problem.answer, answer) or (
            self._grading == "math" and same_mathematics(problem.answer, answer, problem.question)
        )
        return float(right)

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
        return Problem(self.name, question_id(question), question, answer, item=number)
