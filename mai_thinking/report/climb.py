"""What a whole climb leaves for people: one page with figures in the climb's `report/`."""

from collections.abc import Iterator, Sequence

from mai_thinking.experiments.plan import ClimbPlan
from mai_thinking.report.document import Cell, Document, Table, fenced, printed
from mai_thinking.report.lineage import report as report_lineage
from mai_thinking.report.panels import PASS, best_of, over_stages, parts_of
from mai_thinking.report.reading import Climb, Run, read_run
from mai_thinking.report.summary import interval_of
from mai_thinking.rl.trace_report import printable

SHOWN = 2
"""Samples of each task, then and now."""


def write_report(plan: ClimbPlan) -> None:
    """`report/summary.md`, `summary.json`, and with the `plots` extra figures, of a climb that is done."""
    climb = Climb(plan.path, plan.config.name, [read_run(stage.folder.path) for stage in plan.stages])
    runs = climb.stages
    climbing = [run for run in runs if run.kind == "reinforcement learning"]
    minutes = sum(run.minutes for run in runs)
    resets = sum(run.collapse is not None for run in runs)
    answered = f", {resets} of which collapsed and was answered" if resets else ""
    page = Document(climb.name)
    page.facts["minutes"] = minutes
    page.add(f"{len(runs)} stages{answered}, {minutes:.0f} minutes of work; the model is in `{runs[-1].name}/final`.")
    page.add_table("stages", stage_table(runs), "Stages")
    if climbing:
        page.add_table("held_out", pass_table(climbing), "Held-out problems")
        page.add_figures(over_stages(climb))
        page.add(*[f"**{run.name}** {run.collapse}" for run in climbing if run.collapse is not None])
        page.add(*_then_and_now(climbing), heading="Then and now")
    model = runs[-1].path / "final"
    page.add(printed(lambda console: report_lineage(model, console)), heading="Where it came from")
    page.write(plan.path / "report")


def stage_table(runs: Sequence[Run]) -> Table:
    """Every stage: what it was, its steps, its minutes, and what came of it."""
    rows: list[list[Cell]] = [[run.name, run.kind, run.steps_done, run.minutes, _outcome(run)] for run in runs]
    return Table(["stage", "run", "steps", "minutes", "outcome"], rows, digits=1)


def pass_table(climbing: Sequence[Run]) -> Table:
    """Each task's held-out pass@1 and pass@k: at its first evaluation, its best on the way, and in the last stage that
    has it."""
    rows: list[list[Cell]] = []
    for task in _tasks(climbing):
        marks = [record for run in climbing for record in run.evaluations if PASS + task in record]
        first, last = marks[0], marks[-1]
        best = max(record[PASS + task] for record in marks)
        k = best_of(last)
        ends = first.get(f"{k}/{task}"), last.get(f"{k}/{task}")
        rows.append([printable(task), first[PASS + task], best, interval_of(last, task), *ends, k])
    columns = ["task", "pass@1 at first", "at best", "at last", "pass@k at first", "pass@k at last", "k"]
    return Table(columns, rows)


def _tasks(climbing: Sequence[Run]) -> list[str]:
    return parts_of([record for run in climbing for record in run.evaluations], PASS)


def _outcome(run: Run) -> str:
    marks = run.evaluations
    if run.collapse is not None:
        return f"collapsed at step {run.collapse.step}"
    if marks and "pass@1" in marks[0]:
        return f"held-out pass@1 {marks[0]['pass@1']:.3f} → {marks[-1]['pass@1']:.3f}"
    if marks:
        return f"{marks[-1]['bits_per_byte']:.3f} bits per byte of held-out text"
    return f"loss {run.steps[0]['loss']:.3f} → {run.steps[-1]['loss']:.3f}" if run.steps else ""


def _then_and_now(climbing: Sequence[Run]) -> Iterator[str]:
    """Of each task: responses of the first stage that has it at its first evaluation, and of the last at its last."""
    for task in _tasks(climbing):
        told = [(run, [sample for sample in run.samples if sample["task"] == task]) for run in climbing]
        having = [(run, samples) for run, samples in told if samples]
        if not having:
            continue
        yield f"### {printable(task)}"
        for when, (run, samples), place in (("then", having[0], 0), ("now", having[-1], -1)):
            step = samples[place]["step"]
            yield f"**{when}** ({run.name}, after {step} steps)"
            for sample in [sample for sample in samples if sample["step"] == step][:SHOWN]:
                mark = "right" if sample["passed"] else f"wrong: it is {printable(str(sample['answer']))}"
                yield f"{fenced(printable(sample['question'] + chr(10) + sample['response']))}\n({mark})"
