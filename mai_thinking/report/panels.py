"""Which figures a run gets, in its Markdown page as in its HTML page: those that its records have numbers for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mai_thinking.report.figures import Figure, HeatMap, Panel, Series, condensed
from mai_thinking.report.reading import Climb, Run
from mai_thinking.report.timeline import timeline
from mai_thinking.rl.trace_report import printable
from mai_thinking.training.metrics import Record

PASS, BITS = "pass@1/", "bits_per_byte/"
THOUGHTS = {
    "pass@1": "as it answers",
    "pass@1_half_thought": "half of its thought",
    "pass@1_other_thought": "the thought of another problem",
    "pass@1_emptied": "its thought emptied",
}
"""Held-out pass@1 with the model's own thought, and with what was put in its place."""


class Curve(NamedTuple):
    """A number of the step records, over steps."""

    field: str
    title: str
    log_y: bool = False


CURVES = (
    Curve("loss", "Loss"),
    Curve("pass_rate", "Pass rate of the groups learned from"),
    Curve("reward", "Reward"),
    Curve("entropy", "Entropy Ĥ, nats a token"),
    Curve("clip_relaxation", "k, the trust region's relaxation"),
    Curve("response_length", "Response length, tokens"),
    Curve("cut_off", "Share of responses cut off"),
    Curve("repetition", "Share of responses that loop"),
    Curve("rollouts_used", "Share of rollouts learned from"),
    Curve("staleness", "Staleness, updates"),
    Curve("idle/learner", "Share of a step that the learner waits"),
    Curve("idle/workers", "Share of the time that workers are idle"),
    Curve("mismatch", "Mismatch, learner against engine", log_y=True),
    Curve("grad_norm", "Gradient norm", log_y=True),
    Curve("lr", "Learning rate"),
    Curve("tokens_per_second", "Tokens a second"),
)
LOAD = (
    Curve("violation_max", "Violation rate, worst layer", log_y=True),
    Curve("dead_experts", "Experts that no token chose"),
    Curve("router_entropy", "Router entropy, nats"),
)
Clock = Callable[[Record], float]
"""Where a record stands on the x axis."""


def figures_of(run: Run) -> list[Figure]:
    """All figures of a run."""
    return [*held_out(run), curves(run), *load(run), *timeline(run)] if run.steps else held_out(run)


def held_out(run: Run) -> list[Figure]:
    """What the run's evaluations say of text or problems that it has not seen."""
    marks = run.evaluations
    figures = []
    if passed := pass_series(marks):
        figures.append(Figure("climb", [Panel("Held-out pass@1, with 95 % intervals", passed, span=(0, 1))]))
    if thought := thought_panels(marks):
        figures.append(Figure("thought", thought))
    if by_size := size_panels(marks):
        figures.append(Figure("size", by_size))
    if categories := parts_of(marks, BITS):
        yardsticks = run.notes.get("compressors", {})
        bits = [_field(marks, BITS + category, name=category) for category in categories]
        guides = [(yardsticks[c]["xz"], place) for place, c in enumerate(categories) if c in yardsticks]
        title = "Held-out bits per byte" + (" (dashed: xz -9e)" if guides else "")
        figures.append(Figure("bits_per_byte", [Panel(title, bits, guides=guides)]))
    return figures


def thought_panels(marks: Sequence[Record]) -> list[Panel]:
    """Whether the thought decides the answer: pass@1 with the model's own, half of it, another's and none, in all and
    by task; and how many responses have one."""
    tasks = parts_of(marks, PASS)
    panels = []
    for suffix in ("", *(f"/{task}" for task in tasks if len(tasks) > 1)):
        passed = [_field(marks, name + suffix, name=title) for name, title in THOUGHTS.items()]
        title = f"{printable(suffix[1:])}: pass@1 by thought" if suffix else "Held-out pass@1 by thought"
        if any(series.x for series in passed[1:]):
            panels.append(Panel(title, [series for series in passed if series.x], span=(0, 1)))
    shares = [_field(marks, f"thought_share/{task}", name=printable(task)) for task in tasks]
    shares = [series for series in shares if series.x] or [_field(marks, "thought_share", name="all")]
    if shares[0].x:
        panels.insert(1, Panel("Share of responses with a thought", shares, span=(0, 1)))
    return panels


def size_panels(marks: Sequence[Record]) -> list[Panel]:
    """Pass rate and response length by the problem's size, two panels a task, a line a size."""
    names = dict.fromkeys(name for record in marks for name in record)
    found = [match for name in names if (match := re.fullmatch(r"pass@1_size/(.+)/(\d+)", name))]
    tasks = dict.fromkeys(match[1] for match in found)
    panels = []
    for task in tasks:
        sizes = sorted({int(match[2]) for match in found if match[1] == task})
        for field, title in (("pass@1_size", "pass@1 by size"), ("response_length_size", "response length by size")):
            lines = [
                _field(marks, f"{field}/{task}/{size}", name=str(size), shade=place / max(1, len(sizes) - 1))
                for place, size in enumerate(sizes)
            ]
            span = (0.0, 1.0) if field == "pass@1_size" else None
            panels.append(Panel(f"{printable(task)}: {title}", [line for line in lines if line.x], span=span))
    return panels


def curves(run: Run) -> Figure:
    """The numbers of its steps."""
    target = run.config.get("objective", {}).get("target_entropy")
    panels = [_curve(run.steps, curve, target if curve.field == "entropy" else None) for curve in CURVES]
    name = "training" if run.kind == "reinforcement learning" else "loss"
    return Figure(name, [panel for panel in panels if panel], columns=3, size=(4.5, 3.0))


def load(run: Run) -> list[Figure]:
    """How evenly the routers spread the tokens over the experts, over time."""
    told = [record for record in run.steps if record.get("violation")]
    if not told:
        return []
    layers = [f"MoE {index + 1}" for index in range(len(told[0]["violation"]))]
    stretches = np.array_split([record["violation"] for record in told], min(len(told), 120))
    means = np.stack([stretch.mean(0) for stretch in stretches], axis=1)
    title = "Violation rate by layer: the busiest expert's load over the mean, less 1"
    grid = HeatMap(title, layers, means.tolist(), told[0]["step"], told[-1]["step"])
    others = [_curve(run.steps, curve, None) for curve in LOAD]
    return [Figure("expert_load", [grid, *(panel for panel in others if panel)], size=(5.5, 3.0))]


def pass_series(marks: Sequence[Record], at: Clock = lambda record: record["step"]) -> list[Series]:
    """Held-out pass@1 of each task with its interval."""
    lines = []
    for task in parts_of(marks, PASS):
        name = PASS + task
        told = [record for record in marks if name in record]
        ends = [[record.get(f"pass@1_{end}/{task}") for record in told] for end in ("low", "high")]
        band: list[Any] = [] if any(value is None for end in ends for value in end) else ends
        lines.append(Series(printable(task), [at(record) for record in told], [record[name] for record in told], *band))
    return lines


def best_of(record: Record) -> str:
    """`pass@k` for the record's k."""
    counts = [int(match[1]) for name in record if (match := re.fullmatch(r"pass@(\d+)", name))]
    return f"pass@{max(counts, default=1)}"


def over_stages(climb: Climb) -> list[Figure]:
    """Held-out problems and training on the climb's clock. A stage's time is taken as even over its steps."""
    stages = list(zip(climb.stages, climb.begins, strict=True))
    climbing = [(stage, begin) for stage, begin in stages if stage.kind == "reinforcement learning"]
    if not climbing:
        return []
    first = climbing[0][1]
    marks, bands = [], []
    for stage, begin in stages:
        if begin >= first and stage.kind == "self-distillation":
            bands.append((begin, begin + stage.minutes))
        elif begin >= first:
            marks.append((begin, stage.path.name))
        if stage.collapse:
            marks.append((_clock(stage, begin)({"step": stage.collapse.step}), "collapse"))
    lines: list[Series] = []
    places: dict[str, int] = {}  # a task keeps its colour
    for stage, begin in climbing:
        for series in pass_series(stage.evaluations, _clock(stage, begin)):
            lines.append(replace(series, colour=places.setdefault(series.name, len(places))))
        for task in parts_of(stage.evaluations, PASS):
            x, y = _points(stage.evaluations, f"{best_of(stage.evaluations[-1])}/{task}", _clock(stage, begin))
            lines.append(Series("", x, y, style="dotted", colour=places[printable(task)]))
    shared: dict[str, Any] = {"x_name": "minutes of work", "marks": marks, "bands": bands}
    title = "Held-out pass@1, with 95 % intervals (dotted: pass@k; shaded: self-distillation)"
    panels = []
    for curve in CURVES:
        pieces = [
            condensed(curve.title, *_points(stage.steps, curve.field, _clock(stage, begin)), style="noisy", colour=0)
            for stage, begin in climbing
        ]
        if any(piece.x for piece in pieces):
            panels.append(Panel(curve.title, [p for p in pieces if p.x], log_y=curve.log_y, **shared))
    return [
        Figure("climb", [Panel(title, lines, span=(0, 1), **shared)], size=(11, 5)),
        Figure("training", panels, columns=3, size=(4.5, 3.0)),
    ]


def _clock(stage: Run, begin: float) -> Clock:
    return lambda record: begin + stage.minutes * record["step"] / max(1, stage.steps_done)


def _points(records: Sequence[Record], field: str, at: Clock) -> tuple[list[float], list[float]]:
    told = [record for record in records if isinstance(record.get(field), int | float)]
    return [at(record) for record in told], [record[field] for record in told]


def _field(marks: Sequence[Record], field: str, *, name: str, **options: Any) -> Series:
    return Series(name, *_points(marks, field, lambda record: record["step"]), **options)


def parts_of(marks: Sequence[Record], prefix: str) -> list[str]:
    """What follows `prefix` in the records' fields, in the order in which it first comes."""
    names = dict.fromkeys(name for record in marks for name in record if name.startswith(prefix))
    return [name.removeprefix(prefix) for name in names]


def _curve(steps: Sequence[Record], curve: Curve, guide: float | None) -> Panel | None:
    x, y = _points(steps, curve.field, lambda record: record["step"])
    series = condensed(curve.title, x, y, style="noisy")
    guides = [] if guide is None else [(guide, None)]
    return Panel(curve.title, [series], log_y=curve.log_y, guides=guides) if series.x else None
