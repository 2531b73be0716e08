"""What a whole climb leaves for people: one Markdown page with figures in the climb's `report/`."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mai_thinking.config.storage import atomic_file
from mai_thinking.experiments.plan import ClimbPlan, Stage
from mai_thinking.report.lineage import report as report_lineage
from mai_thinking.rl.report import PASS
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.training.metrics import Record, read_records
from mai_thinking.training.report import fenced, pyplot, save_figure, smooth

SHOWN = 2
"""Samples of each task, then and now."""
_PANELS = (
    ("entropy", "entropy Ĥ (nats per token)"),
    ("response_length", "response length (tokens)"),
    ("pass_rate", "pass rate of the groups learned from"),
    ("clip_relaxation", "k, the trust region's relaxation"),
)


@dataclass(frozen=True)
class Span:
    """A stage on the climb's clock, and what it recorded."""

    stage: Stage
    begin: float
    """Minutes of work that went before it."""
    minutes: float
    records: list[Record]

    def at(self, step: int) -> float:
        """When it had done `step` steps, in minutes; its time is taken as even over its steps."""
        last = max((record["step"] for record in self.records), default=0)
        return self.begin + self.minutes * step / max(1, last)

    @property
    def steps(self) -> list[Record]:
        """Its training steps."""
        return [record for record in self.records if "kind" not in record]

    @property
    def evaluations(self) -> list[Record]:
        """Its evaluations on held-out text or problems."""
        return [record for record in self.records if record.get("kind") == "evaluation"]


def write_report(plan: ClimbPlan) -> None:
    """`report/summary.md`, and with the `plots` extra `climb.png` and `training.png`, of a climb that is done."""
    folder = plan.path / "report"
    folder.mkdir(exist_ok=True)
    spans = list(_spans(plan))
    climbs = [span for span in spans if span.stage.run == "grpo"]
    page = [f"# {plan.config.name}", _headline(spans), "## Stages\n\n" + stage_table(spans)]
    if climbs:
        page.append("## Held-out problems\n\n" + pass_table(climbs))
        page += [f"![{name}]({name}.png)" for name in draw(folder, spans)]
        page += [f"**{span.stage.name}** {span.stage.collapse}" for span in climbs if span.stage.collapse is not None]
        page.append("## Then and now\n\n" + "\n\n".join(_samples(climbs)))
    page.append("## Where it came from\n\n" + fenced(_lineage(plan.stages[-1])))
    with atomic_file(folder / "summary.md") as path:
        path.write_text("\n\n".join(page) + "\n")


def stage_table(spans: Sequence[Span]) -> str:
    """Every stage: what it ran, its steps, its minutes, and what came of it; in Markdown."""
    lines = ["| stage | run | steps | minutes | outcome |", "|---|---|---:|---:|---|"]
    for span in spans:
        stage = span.stage
        steps = max((record["step"] for record in span.records), default=0)
        lines.append(f"| {stage.name} | {stage.run} | {steps:,} | {span.minutes:.1f} | {_outcome(span)} |")
    return "\n".join(lines)


def pass_table(climbs: Sequence[Span]) -> str:
    """Each task's held-out pass@1 and pass@k: at its first evaluation, its best on the way, and in the last stage that
    has it; in Markdown."""
    lines = ["| task | pass@1 at first | at best | at last | pass@k at first | at last |", "|---|" + "---:|" * 5]
    for task in _tasks(climbs):
        marks = [record for span in climbs for record in span.evaluations if PASS + task in record]
        k = _pass_k(marks[-1], task)
        first, last = marks[0], marks[-1]
        best = max(record[PASS + task] for record in marks)
        lines.append(
            f"| {task} | {first[PASS + task]:.3f} | {best:.3f} | {last[PASS + task]:.3f} "
            f"({last[f'pass@1_low/{task}']:.3f}–{last[f'pass@1_high/{task}']:.3f}) "
            f"| {first.get(k, float('nan')):.3f} | {last[k]:.3f} ({k.partition('/')[0]}) |"
        )
    return "\n".join(lines)


def _pass_k(record: Record, task: str) -> str:
    """The name of pass@k of a task, for the record's k."""
    others = [name for name in record if re.fullmatch(rf"pass@(?!1/)\d+/{re.escape(task)}", name)]
    return others[0] if others else PASS + task


def draw(folder: Path, spans: Sequence[Span]) -> list[str]:
    """The figures as PNG; returns their names, none without matplotlib."""
    plt = pyplot()
    if plt is None:
        return []
    _draw_climb(plt, folder / "climb.png", spans)
    _draw_training(plt, folder / "training.png", spans)
    return ["climb", "training"]


def _spans(plan: ClimbPlan) -> Iterator[Span]:
    """In the order in which they were run, one after the other."""
    begin = 0.0
    for stage in plan.stages:
        minutes = stage.seconds / 60
        yield Span(stage, begin, minutes, read_records(stage.folder.metrics))
        begin += minutes


def _tasks(climbs: Sequence[Span]) -> list[str]:
    """In the order in which they first come."""
    names = (name for span in climbs for record in span.evaluations for name in record if name.startswith(PASS))
    return [name.removeprefix(PASS) for name in dict.fromkeys(names)]


def _headline(spans: Sequence[Span]) -> str:
    minutes = sum(span.minutes for span in spans)
    resets = sum(span.stage.collapse is not None for span in spans)
    answered = f", {resets} of which collapsed and was answered" if resets else ""
    return (
        f"{len(spans)} stages{answered}, {minutes:.0f} minutes of work; the model is in `{spans[-1].stage.name}/final`."
    )


def _outcome(span: Span) -> str:
    evaluations, steps = span.evaluations, span.steps
    if span.stage.collapse is not None:
        return f"collapsed at step {span.stage.collapse.step}"
    match span.stage.run:
        case "pretrain" if evaluations:
            return f"{evaluations[-1]['bits_per_byte']:.3f} bits per byte of held-out text"
        case "grpo" if evaluations:
            return f"held-out pass@1 {evaluations[0]['pass@1']:.3f} → {evaluations[-1]['pass@1']:.3f}"
        case _ if steps:
            return f"loss {steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}"
    return ""


def _draw_climb(plt: Any, path: Path, spans: Sequence[Span]) -> None:
    climbs = [span for span in spans if span.stage.run == "grpo"]
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    for index, task in enumerate(_tasks(climbs)):
        label: str | None = task
        for span in climbs:
            marks = [record for record in span.evaluations if PASS + task in record]
            if not marks:
                continue
            minutes = [span.at(record["step"]) for record in marks]
            style = {"color": f"C{index}", "markersize": 3}
            axes.plot(minutes, [record[PASS + task] for record in marks], "o-", label=label, **style)
            best_of = [record[_pass_k(record, task)] for record in marks]
            axes.plot(minutes, best_of, color=f"C{index}", linestyle=":", linewidth=0.9)
            low, high = ([record[f"pass@1_{end}/{task}"] for record in marks] for end in ("low", "high"))
            axes.fill_between(minutes, low, high, color=f"C{index}", alpha=0.12)
            label = None
    first = spans[0].stage
    start = " since random weights" if not first.parents else f" since {first.parents[0]}"
    axes.set(xlabel=f"minutes of work{start}", ylabel="held-out pass@1, with 95 % interval", ylim=(0, 1))
    axes.plot([], [], color="grey", linestyle=":", label="pass@k")
    axes.fill_between([], [], [], color="tab:green", alpha=0.25, label="self-distillation")
    axes.grid(alpha=0.3)
    _mark(axes, spans, names=True)
    axes.legend(loc="upper left")
    save_figure(figure, path)


def _draw_training(plt: Any, path: Path, spans: Sequence[Span]) -> None:
    figure, grid = plt.subplots(2, 2, figsize=(13, 7), layout="constrained")
    for axes, (name, title) in zip(grid.flat, _PANELS, strict=True):
        for span in spans:
            if span.stage.run != "grpo":
                continue
            minutes = [span.at(record["step"]) for record in span.steps]
            values = [record[name] for record in span.steps]
            axes.plot(minutes, values, linewidth=0.5, alpha=0.4, color="tab:blue")
            axes.plot(minutes, smooth(values, keep=0.8), color="tab:blue")
        axes.set(title=title, xlabel="minutes of work")
        axes.grid(alpha=0.3)
        _mark(axes, spans, names=False)
    save_figure(figure, path)


def _mark(axes: Any, spans: Sequence[Span], *, names: bool) -> None:
    """A band for each self-distillation, a line where a climb begins, a red one where it collapsed."""
    climbing = [span.begin for span in spans if span.stage.run == "grpo"]
    for span in spans:
        stage, end = span.stage, span.begin + span.minutes
        if end <= climbing[0]:
            continue
        if stage.run == "self_distill":
            axes.axvspan(span.begin, end, color="tab:green", alpha=0.25)
        else:
            axes.axvline(span.begin, color="grey", linewidth=0.7)
        if stage.collapse is not None:
            axes.axvline(span.at(stage.collapse.step), color="tab:red", linestyle="--")
        if names:
            axes.annotate(
                stage.name, (span.begin, 1.0), (2, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                rotation=20, fontsize=7, annotation_clip=False,
            )  # fmt: skip
    axes.set_xlim(left=climbing[0])


def _samples(climbs: Sequence[Span]) -> Iterator[str]:
    """Of each task: rollouts of the first stage that has it before its first step, and of the last at its end."""
    for task in _tasks(climbs):
        stages = [span.stage for span in climbs if any(PASS + task in record for record in span.evaluations)]
        stages = [stage for stage in stages if _steps_with(stage, task)]
        if not stages:
            continue
        yield f"### {task}"
        for when, stage, pick in (("then", stages[0], min), ("now", stages[-1], max)):
            step = pick(_steps_with(stage, task))
            yield f"**{when}** ({stage.name}, after {step} steps)"
            for row in _rollouts(stage, task, step):
                mark = "right" if row["passed"] else f"wrong: it is {row['reference']}"
                yield f"{fenced(row['prompt'] + row['response'])}\n({mark})"


def _steps_with(stage: Stage, task: str) -> set[int]:
    table = TraceStore(stage.folder.path / FOLDER).read(tasks={task}, columns=["step"])
    return set(table["step"].to_pylist())


def _rollouts(stage: Stage, task: str, step: int) -> list[Mapping[str, Any]]:
    """The first of each of the step's first groups."""
    columns = ["group_id", "prompt", "response", "reference", "passed"]
    found: dict[int, Mapping[str, Any]] = {}
    for row in TraceStore(stage.folder.path / FOLDER).read(steps={step}, tasks={task}, columns=columns).to_pylist():
        found.setdefault(row["group_id"], row)
    return list(found.values())[:SHOWN]


def _lineage(last: Stage) -> str:
    """The tree from the last model back to random weights, every file in it checked."""
    text = io.StringIO()
    report_lineage(last.folder.final, Console(file=text, width=160))
    return text.getvalue().rstrip()
