"""Questions and answers from a JSONL file, GSM8K's for one; graded as text or as mathematics."""

import math
from pathlib import Path

from mai_thinking.config.tasks import TaskSection
from mai_thinking.data.jsonl import Line, check_text, read_jsonl, shown
from mai_thinking.data.questions import Split, split_of
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks.base import Problem, Task, same_text
from mai_thinking.rl.tasks.mathematics import same_mathematics


class JsonlTask(Task):
    """Problem `index` is question `index` of its split, over and over; both splits come from the one file."""

    def __init__(self, section: TaskSection) -> None:
        """Raises UsageError with the file, the line and the fix if the file cannot be used."""
        assert section.path is not None, "the section's validator sees to it"
        super().__init__(section)
        self._path = Path(section.path)
        self.problems: dict[Split, list[Problem]] = {"train": [], "held_out": []}
        """In the order of the file."""
        first: dict[str, Problem] = {}
        repeated, contradicting = 0, list[str]()
        for line in read_jsonl(self._path):
            problem = self._read(line)
            known = first.setdefault(problem.id, problem)
            if known is problem:
                self.problems[split_of(problem.question)].append(problem)
                continue
            repeated += 1
            if not self.verify(known, problem.answer):
                contradicting.append(f"line {line.number} against line {known.item}")
        if repeated:
            others = f", {len(contradicting)} with another answer ({contradicting[0]})" if contradicting else ""
            lines = "1 line repeats a question" if repeated == 1 else f"{repeated:,} lines repeat a question"
            self.notes = [f"{self._path.name}: {lines}{others}; the first of each counts, the duplicates are left out"]

    def problem(self, split: Split, index: int) -> Problem:
        problems = self.problems[split]
        if not problems:
            raise self.lacks(split, f": {self._path} is too small; add questions to it, or remove the task")
        return problems[index % len(problems)]

    def verify(self, problem: Problem, answer: str) -> float:
        """1 if the answer is the reference as text or, by `math`, as mathematics."""
        mathematics = self.section.grading == "math"
        right = same_text(problem.answer, answer)
        return float(right or (mathematics and same_mathematics(problem.answer, answer, problem.question)))

    def _read(self, line: Line) -> Problem:
        section, where, texts = self.section, f"{shown(self._path)}, line {line.number}", []
        for option, field in (("question_field", section.question_field), ("answer_field", section.answer_field)):
            value = line.value.get(field) if isinstance(line.value, dict) else None
            number = type(value) is int or (isinstance(value, float) and math.isfinite(value))
            if not (number or isinstance(value, str)) or not str(value).strip():
                raise UsageError(f"{where}: no text in field {field!r}; mend the line, or name the field in `{option}`")
            texts.append(check_text(str(value), f"{where}, field {field!r}"))
        question, answer = texts[0].strip(), texts[1].rpartition("####")[2].strip()
        if not answer:
            raise UsageError(f"{where}: nothing after `####`; mend or remove the line")
        return self.made(question, answer, item=line.number)
