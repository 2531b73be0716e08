"""What a consolidated model keeps of its specialists: the page of `scripts/consolidation.py`. Report §3.5."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from mai_thinking.bench.machine import describe
from mai_thinking.config.table import Cell, Interval, Table
from mai_thinking.report.document import Document
from mai_thinking.rl.evaluation import Answer, interval

Answers = Mapping[str, Sequence[Answer]]
"""By task, one to each problem; every model has the same problems."""
_DRAWS = 4000


def write_consolidated(models: Mapping[str, Answers], specialists: Sequence[str], out: Path) -> None:
    """`summary.md` and `summary.json` of what `models` (by name) answered; those among the `specialists` their own
    tasks alone, the others, the students, all tasks."""
    page, students = Document(out.name), [name for name in models if name not in specialists]
    rows: list[list[Cell]] = []
    for student in students:
        cells = [kept(models[student], models[specialist]) for specialist in specialists]
        rows.append([student, *cells])
    page.add("pass@1 of each model over each specialist's, on that one's tasks (95 % interval over problems):")
    page.add_table("kept", Table(["", *specialists], rows))

    measures: dict[str, Callable[[Sequence[Answer]], Cell]] = {
        "pass@1": lambda of_task: Interval(
            fmean(a.passed for a in of_task), *interval([float(a.passed) for a in of_task])
        ),
        "tokens of a response": lambda of_task: fmean(a.tokens for a in of_task),
        "share of responses with words of another language before the answer": lambda of_task: fmean(
            a.foreign for a in of_task
        ),
        "share of responses with a call": lambda of_task: fmean(a.called for a in of_task),
    }
    tasks = models[students[0]]
    for title, measure in measures.items():
        table: list[list[Cell]] = [
            [task, *(measure(answers[task]) if task in answers else None for answers in models.values())]
            for task in tasks
        ]
        page.add_table(title, Table(["", *models], table), heading=f"Held-out problems: {title}")
    page.facts["problems"] = {task: len(answers) for task, answers in tasks.items()}
    page.facts["made"] = {"command": "python " + shlex.join(sys.argv), **describe()}
    page.write(out)


def kept(student: Answers, specialist: Answers) -> Interval:
    """The student's mean pass@1 over the specialist's tasks as a share of the specialist's, with the 95 % interval of
    the bootstrap: problems are drawn anew within each task, the same for both."""
    random = np.random.default_rng(0)
    means, draws = np.zeros(2), np.zeros((2, _DRAWS))
    for task, answers in specialist.items():
        passed = np.array([[a.passed for a in answers] for answers in (student[task], answers)], dtype=float)
        places = random.integers(passed.shape[1], size=(_DRAWS, passed.shape[1]))
        means, draws = means + passed.mean(axis=1), draws + passed[:, places].mean(axis=-1)
    low, high = np.quantile(draws[0] / draws[1], (0.025, 0.975))
    return Interval(float(means[0] / means[1]), float(low), float(high))
