"""The pages of a run and of a whole climb, in Markdown as in HTML; `report/summary.md` has the figures beside it, and
the same numbers in `report/summary.json`."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mai_thinking.config.grpo import SamplingSection
from mai_thinking.config.table import Cell, Interval, Table
from mai_thinking.errors import printable
from mai_thinking.experiments.plan import ClimbPlan
from mai_thinking.report.document import Document, fenced, printed
from mai_thinking.report.lineage import report as report_lineage
from mai_thinking.report.panels import BITS, PASS, best_of, figures_of, over_stages, parts_of
from mai_thinking.report.reading import RL, Climb, Run
from mai_thinking.training.metrics import Record


def write_summary(folder: Path) -> None:
    """Write the page of the run in `folder`, from what lies there; on rank 0."""
    if int(os.environ.get("RANK", "0")):
        return
    run = Run(folder)
    page = Document(run.name)
    add_run(page, run)
    page.write(folder / "report")


def write_report(plan: ClimbPlan) -> None:
    """Write the page of a climb that is done, every file of its model checked."""
    climb = Climb(plan.path, plan.config.name, [Run(stage.folder.path) for stage in plan.stages])
    model = climb.stages[-1].path / "final"
    page = climb_page(climb, printed(lambda console: report_lineage(model, console)))
    page.write(plan.path / "report")


def add_run(page: Document, run: Run) -> None:
    """What there is to say of a run of any recipe."""
    page.facts |= {"kind": run.kind, "status": run.status, "steps": run.steps_done}
    if start := run.config.get("init_from"):
        page.add(f"From `{start}`.")
    if plan := run.notes.get("plan"):
        page.add(fenced(plan))
    if run.collapse is not None:
        page.add(f"**{run.name}** {run.collapse}")
    if run.kind == RL:
        sampling = SamplingSection.model_validate(run.config.get("sampling", {}))
        groups = run.config.get("groups_per_step")
        page.add(f"{run.steps_done:,} steps of {groups} groups of {sampling.full_size} rollouts.")
    if run.evaluations and run.kind == RL:
        page.add_table("held_out", pass_table([run]), "Held-out problems")
        last = run.evaluations[-1].items()
        page.facts["last_evaluation"] = {k: v for k, v in last if isinstance(v, int | float) and "/" not in k}
    elif run.evaluations:
        page.add_table("held_out", bits_table(run), "Held-out bits per byte")
    if mixture := run.notes.get("mixture"):
        columns = [name.replace("_", " ") for name in mixture[0]]
        page.add_table("mixture", Table(columns, [list(row.values()) for row in mixture]), "Mixture")
    for key, heading in (("left_out", "Left out"), ("traces", "Traces")):
        if key in run.notes:
            page.add(run.notes[key].strip(), heading=heading)
    if run.steps and "loss" in run.steps[0]:
        first, final = run.steps[0]["loss"], run.steps[-1]["loss"]
        page.facts["loss"] = {"first": first, "last": final}
        page.add(f"Loss {first:.4f} at the first step, {final:.4f} at the last.")
    if run.evaluations and "parsed" in run.evaluations[-1]:
        page.facts["parsed"] = run.evaluations[-1]["parsed"]
        page.add(f"Of the functions that it writes, {page.facts['parsed']:.0%} parse.")
    page.add_figures(figures_of(run))
    if told := stories(run.samples):
        page.add(*told, heading="The same problem, from the first evaluation to the last")
    if written := run.notes.get("written"):
        page.add(*(fenced(printable(prompt + text)) for prompt, text in written.items()), heading="Samples")


def climb_page(climb: Climb, lineage: str) -> Document:
    """A climb: its stages in a table and on one clock, and what became of the problems."""
    runs = climb.stages
    climbing = [run for run in runs if run.kind == RL]
    collapses = [f"**{run.name}** {run.collapse}" for run in runs if run.collapse is not None]
    minutes, done = sum(run.minutes for run in runs), sum(run.status == "finished" for run in runs)
    page = Document(climb.name)
    page.facts["minutes"] = minutes
    resets = f", {len(collapses)} of which collapsed" if collapses else ""
    page.add(f"{len(runs)} stages{resets}, {done} finished, {minutes:.0f} minutes of work, in `{climb.path}`.")
    rows: list[list[Cell]] = [[run.name, run.kind, run.steps_done, run.minutes, _outcome(run)] for run in runs]
    page.add_table("stages", Table(["stage", "run", "steps", "minutes", "outcome"], rows, digits=1), "Stages")
    page.add(*collapses)
    if climbing:
        page.add_table("held_out", pass_table(climbing), "Held-out problems")
        page.add_figures(over_stages(climb))
        page.add(*_then_and_now(climbing), heading="Then and now")
    page.add(lineage, heading="Where it came from")
    return page


def bits_table(run: Run) -> Table:
    """Model, `gzip -9` and `xz -9e` on the same held-out bytes."""
    last, yardsticks = run.evaluations[-1], run.notes.get("compressors", {})
    rows: list[list[Any]] = []
    for category in parts_of([last], BITS):
        beside = yardsticks.get(category, {})
        rows.append([category, last[BITS + category], beside.get("gzip"), beside.get("xz")])
    rows.append(["weighted", last["bits_per_byte"], None, None])
    return Table(["category", "model", "gzip -9", "xz -9e"], rows, digits=4)


def pass_table(climbing: Sequence[Run]) -> Table:
    """Each task's held-out pass@1 and pass@k, with 95 % intervals: at its first evaluation, at the best on the way, and
    at the last that has it."""
    rows: list[list[Cell]] = []
    for task in _tasks(climbing):
        marks = [record for run in climbing for record in run.evaluations if PASS + task in record]
        best, k = max(marks, key=lambda record: record[PASS + task]), best_of(marks[-1])
        passed = [_interval(record, task) for record in (marks[0], best, marks[-1])]
        rows.append([printable(task), *passed, *(marks[place].get(f"{k}/{task}") for place in (0, -1)), k])
    columns = ["task", "pass@1 before", "pass@1 at best", "pass@1 after", "pass@k before", "pass@k after", "k"]
    return Table(columns, rows)


def stories(samples: Sequence[Record], shown: int = 2) -> list[str]:
    """In Markdown, of each task up to `shown` held-out problems with their responses at the first evaluation, in the
    middle and at the last: those that were learned on the way first, the larger before the smaller."""
    steps = sorted({sample["step"] for sample in samples})
    picked = dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])) if steps else {}
    by_problem: dict[tuple[str, str], dict[int, Record]] = {}
    for sample in samples:
        by_problem.setdefault((sample["task"], sample["question"]), {}).setdefault(sample["step"], sample)
    found = [[of[step] for step in picked] for of in by_problem.values() if picked.keys() <= of.keys()]
    found.sort(key=lambda story: (story[-1]["passed"] and not story[0]["passed"], story[-1].get("size") or 0))
    counts: Counter[str] = Counter()
    told: list[tuple[str, str]] = []
    for story in reversed(found):
        task = story[0]["task"]
        counts[task] += 1
        if counts[task] <= shown:
            parts = [f"**{printable(story[0]['question'])}** ({printable(task)})"]
            for sample in story:
                parts += [f"after {sample['step']:,} steps ({_mark(sample)})", fenced(printable(sample["response"]))]
            told.append((task, "\n\n".join(parts)))
    return [text for _, text in sorted(told, key=lambda one: one[0])]


def _then_and_now(climbing: Sequence[Run]) -> Iterator[str]:
    """Of each task: two responses of the first stage that has it at its first evaluation, and of the last at its
    last."""
    for task in _tasks(climbing):
        told = [(run, [sample for sample in run.samples if sample["task"] == task]) for run in climbing]
        having = [(run, samples) for run, samples in told if samples]
        if having:
            yield f"### {printable(task)}"
        for when, (run, samples), place in zip(("then", "now"), having[:1] + having[-1:], (0, -1), strict=False):
            step = samples[place]["step"]
            yield f"**{when}** ({run.name}, after {step} steps)"
            for sample in [sample for sample in samples if sample["step"] == step][:2]:
                yield f"{fenced(printable(sample['question'] + chr(10) + sample['response']))}\n({_mark(sample)})"


def _mark(sample: Record) -> str:
    return "right" if sample["passed"] else f"wrong: it is {printable(str(sample['answer']))}"


def _tasks(climbing: Sequence[Run]) -> list[str]:
    return parts_of([record for run in climbing for record in run.evaluations], PASS)


def _interval(record: Record, task: str) -> Interval | float:
    value, low, high = record[PASS + task], record.get(f"pass@1_low/{task}"), record.get(f"pass@1_high/{task}")
    return value if low is None or high is None else Interval(value, low, high)


def _outcome(run: Run) -> str:
    marks = run.evaluations
    if run.collapse is not None:
        return f"collapsed at step {run.collapse.step}"
    if marks and "pass@1" in marks[0]:
        return f"held-out pass@1 {marks[0]['pass@1']:.3f} → {marks[-1]['pass@1']:.3f}"
    if marks:
        return f"{marks[-1]['bits_per_byte']:.3f} bits per byte of held-out text"
    return f"loss {run.steps[0]['loss']:.3f} → {run.steps[-1]['loss']:.3f}" if run.steps else ""
