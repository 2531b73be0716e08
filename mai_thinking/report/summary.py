"""The page of results of one run: `report/summary.md` with its figures, the same numbers in `report/summary.json`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mai_thinking.config.grpo import SamplingSection
from mai_thinking.report.document import Document, Interval, Table, fenced
from mai_thinking.report.panels import BITS, PASS, best_of, figures_of, parts_of
from mai_thinking.report.reading import Run, read_run, then_and_now
from mai_thinking.rl.trace_report import printable
from mai_thinking.training.metrics import Record


def write_summary(folder: Path) -> None:
    """Write the page of the run in `folder`, from what lies there; on rank 0. A page from before notes stays."""
    if int(os.environ.get("RANK", "0")):
        return
    run = read_run(folder)
    if run.kind != "reinforcement learning" and not run.notes and (folder / "report" / "summary.md").exists():
        return
    page = Document(run.name)
    add_run(page, run)
    page.write(folder / "report")


def add_run(page: Document, run: Run) -> None:
    """What there is to say of a run of any recipe."""
    page.facts |= {"kind": run.kind, "status": run.status, "steps": run.steps_done}
    if start := run.config.get("init_from"):
        page.add(f"From `{start}`.")
    if plan := run.notes.get("plan"):
        page.add(fenced(plan))
    if run.collapse is not None:
        page.add(f"**{run.name}** {run.collapse}")
    if run.kind == "reinforcement learning":
        _add_problems(page, run)
    elif run.evaluations:
        page.add_table("held_out", bits_table(run), "Held-out bits per byte")
    if mixture := run.notes.get("mixture"):
        columns = [name.replace("_", " ") for name in mixture[0]]
        page.add_table("mixture", Table(columns, [list(row.values()) for row in mixture]), "Mixture")
    for key, heading in (("left_out", "Left out"), ("traces", "Traces")):
        if key in run.notes:
            page.add(run.notes[key].strip(), heading=heading)
    if run.steps and "loss" in run.steps[0]:
        first, last = run.steps[0]["loss"], run.steps[-1]["loss"]
        page.facts["loss"] = {"first": first, "last": last}
        page.add(f"Loss {first:.4f} at the first step, {last:.4f} at the last.")
    page.add_figures(figures_of(run))
    _add_samples(page, run)


def _add_problems(page: Document, run: Run) -> None:
    groups, sampling = run.config.get("groups_per_step"), SamplingSection.model_validate(run.config.get("sampling", {}))
    page.add(f"{run.steps_done:,} steps of {groups} groups of {sampling.full_size} rollouts.")
    if not run.evaluations:
        return
    first, last = run.evaluations[0], run.evaluations[-1]
    page.add_table("held_out", pass_table(first, last), "Held-out problems")
    overall = {name: value for name, value in last.items() if isinstance(value, int | float) and "/" not in name}
    page.facts["last_evaluation"] = overall


def bits_table(run: Run) -> Table:
    """Model, `gzip -9` and `xz -9e` on the same held-out bytes."""
    last, yardsticks = run.evaluations[-1], run.notes.get("compressors", {})
    rows: list[list[Any]] = []
    for category in parts_of([last], BITS):
        beside = yardsticks.get(category, {})
        rows.append([category, last[BITS + category], beside.get("gzip"), beside.get("xz")])
    rows.append(["weighted", last["bits_per_byte"], None, None])
    return Table(["category", "model", "gzip -9", "xz -9e"], rows, digits=4)


def pass_table(first: Record, last: Record) -> Table:
    """pass@1 with its 95 % interval before and after, and pass@k after, by task."""
    tasks = parts_of([last], PASS)
    k = best_of(last)
    columns = ["task", "pass@1 before", "pass@1 after", *([] if k == "pass@1" else [f"{k} after"])]
    cells = [
        [printable(task), *(interval_of(r, task) for r in (first, last)), last.get(f"{k}/{task}")] for task in tasks
    ]
    return Table(columns, [row[: len(columns)] for row in cells])


def interval_of(record: Record, task: str) -> Interval | float | None:
    """A task's pass@1 in one evaluation."""
    value, low, high = (record.get(f"{name}/{task}") for name in ("pass@1", "pass@1_low", "pass@1_high"))
    return value if value is None or low is None or high is None else Interval(value, low, high)


def _add_samples(page: Document, run: Run) -> None:
    stories = then_and_now(run.samples)
    if stories:
        page.add(*map(tell, stories), heading="The same problem, from the first evaluation to the last")
    written: Mapping[str, str] = run.notes.get("written", {})
    samples = [fenced(printable(prompt + text)) for prompt, text in written.items()]
    if samples:
        page.add(*samples, heading="Samples")


def tell(story: Sequence[Record]) -> str:
    """One problem's responses as they changed, in Markdown."""
    first = story[0]
    parts = [f"**{printable(first['question'])}** ({printable(first['task'])})"]
    for sample in story:
        mark = "right" if sample["passed"] else f"wrong: it is {printable(str(first['answer']))}"
        parts.append(f"after {sample['step']:,} steps ({mark})\n\n{fenced(printable(sample['response']))}")
    return "\n\n".join(parts)
