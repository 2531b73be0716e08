"""Which figures a run gets, in its Markdown page as in its HTML page: those that its records have numbers for.

A panel takes runs in a row, each with a clock: a whole climb is drawn as a run is.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mai_thinking.errors import printable
from mai_thinking.report.figures import PALETTE, Figure, HeatMap, Panel, Series, condensed, shade
from mai_thinking.report.reading import RL, Climb, Run
from mai_thinking.report.timeline import timeline
from mai_thinking.training.metrics import Record

PASS, BITS = "pass@1/", "bits_per_byte/"
THOUGHTS = {
    "pass@1": "as it answers",
    "pass@1_half_thought": "half of its thought",
    "pass@1_other_thought": "the thought of another problem",
    "pass@1_emptied": "its thought emptied",
}
"""Held-out pass@1 with the model's own thought, and with what was put in its place."""
CURVES = {
    "loss": "Loss",
    "pass_rate": "Pass rate of the groups learned from",
    "reward": "Reward",
    "entropy": "Entropy Ĥ, nats a token",
    "clip_relaxation": "k, the trust region's relaxation",
    "response_length": "Response length, tokens",
    "cut_off": "Share of responses cut off",
    "repetition": "Share of responses that loop",
    "rollouts_used": "Share of rollouts learned from",
    "staleness": "Staleness, updates",
    "idle/learner": "Share of a step that the learner waits",
    "idle/workers": "Share of the time that workers are idle",
    "mismatch": "Mismatch, learner against engine",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "tokens_per_second": "Tokens a second",
}
LOAD = {
    "violation_max": "Violation rate, worst layer",
    "dead_experts": "Experts that no token chose",
    "router_entropy": "Router entropy, nats",
}
_LOG_Y = {"mismatch", "grad_norm", "violation_max"}
Clock = Callable[[Record], float]
"""Where a record stands on the x axis."""


def by_step(record: Record) -> float:
    """The clock of a single run."""
    return float(record["step"])


def figures_of(run: Run) -> list[Figure]:
    """All figures of a run."""
    return [*held_out(run), curves(run), *load(run), *timeline(run)] if run.steps else held_out(run)


def held_out(run: Run) -> list[Figure]:
    """What the run's evaluations say of text or problems that it has not seen."""
    marks = run.evaluations
    passed = pass_series(marks, by_step)
    figures = [
        Figure("climb", [Panel("Held-out pass@1, with 95 % intervals", passed, span=(0, 1))] if passed else []),
        Figure("thought", thought_panels(marks)),
        Figure("size", size_panels(marks)),
    ]
    if categories := parts_of(marks, BITS):
        yardsticks = run.notes.get("compressors", {})
        bits = [_field(marks, BITS + category, category) for category in categories]
        guides = [(yardsticks[c]["xz"], PALETTE[i]) for i, c in enumerate(categories) if c in yardsticks]
        title = "Held-out bits per byte" + (" (dashed: xz -9e)" if guides else "")
        figures.append(Figure("bits_per_byte", [Panel(title, bits, guides=guides)]))
    return figures


def thought_panels(marks: Sequence[Record]) -> list[Panel]:
    """Whether the thought decides the answer: pass@1 with the model's own, half of it, another's and none, in all and
    by task; and how many responses have one."""
    tasks = parts_of(marks, PASS)
    panels = []
    for suffix in ("", *(f"/{task}" for task in tasks if len(tasks) > 1)):
        passed = [_field(marks, name + suffix, title) for name, title in THOUGHTS.items()]
        title = f"{printable(suffix[1:])}: pass@1 by thought" if suffix else "Held-out pass@1 by thought"
        if any(series.x for series in passed[1:]):
            panels.append(Panel(title, [series for series in passed if series.x], span=(0, 1)))
    shares = [_field(marks, f"thought_share/{task}", printable(task)) for task in tasks]
    shares = [series for series in shares if series.x] or [_field(marks, "thought_share", "all")]
    if shares[0].x:
        panels.insert(1, Panel("Share of responses with a thought", shares, span=(0, 1)))
    return panels


def size_panels(marks: Sequence[Record]) -> list[Panel]:
    """Pass rate and response length by the problem's size, two panels a task, a line a size."""
    sizes: dict[str, list[int]] = {}
    for part in parts_of(marks, "pass@1_size/"):
        task, _, size = part.rpartition("/")
        sizes.setdefault(task, []).append(int(size))
    panels = []
    for task, found in sizes.items():
        for field, title in (("pass@1_size", "pass@1 by size"), ("response_length_size", "response length by size")):
            lines = [
                _field(marks, f"{field}/{task}/{size}", str(size), colour=shade(place, len(found)))
                for place, size in enumerate(sorted(found))
            ]
            span = (0.0, 1.0) if field == "pass@1_size" else None
            panels.append(Panel(f"{printable(task)}: {title}", [line for line in lines if line.x], span=span))
    return panels


def curves(run: Run) -> Figure:
    """The numbers of its steps."""
    name = "training" if run.kind == RL else "loss"
    return Figure(name, _curves(CURVES, [(run, by_step)]), columns=3, size=(4.5, 3.0))


def load(run: Run) -> list[Figure]:
    """How evenly the routers spread the tokens over the experts, over time."""
    told = [record for record in run.steps if record.get("violation")]
    if not told:
        return []
    layers = [f"MoE {index + 1}" for index in range(len(told[0]["violation"]))]
    stretches = np.array_split([record["violation"] for record in told], min(len(told), 120))
    means = np.stack([stretch.mean(0) for stretch in stretches], axis=1)
    title = "Violation rate by layer: the busiest expert's load over the mean, less 1"
    grid = HeatMap(title, layers, means.tolist(), (told[0]["step"], told[-1]["step"]))
    return [Figure("expert_load", [grid, *_curves(LOAD, [(run, by_step)])], size=(5.5, 3.0))]


def over_stages(climb: Climb) -> list[Figure]:
    """Held-out problems and training on the climb's clock. A stage's time is taken as even over its steps."""
    now, climbing, marks, bands = 0.0, list[tuple[Run, Clock]](), list[tuple[float, str]](), list[tuple[float, float]]()
    for stage in climb.stages:
        begin, now = now, now + stage.minutes
        clock = _clock(stage, begin)
        if stage.kind == RL:
            climbing.append((stage, clock))
        if climbing and stage.kind == "self-distillation":
            bands.append((begin, now))
        elif climbing:
            marks.append((begin, stage.path.name))
        if stage.collapse:
            marks.append((clock({"step": stage.collapse.step}), "collapse"))
    lines: list[Series] = []
    colours: dict[str, int] = {}  # a task keeps its own
    for stage, clock in climbing:
        lines += pass_series(stage.evaluations, clock, colours)
        for task in parts_of(stage.evaluations, PASS):
            name = f"{best_of(stage.evaluations[-1])}/{task}"
            lines.append(_field(stage.evaluations, name, "", clock, style="dotted", colour=colours[task]))
    shared: dict[str, Any] = {"x_name": "minutes of work", "marks": marks, "bands": bands}
    title = "Held-out pass@1, with 95 % intervals (dotted: pass@k; shaded: self-distillation)"
    figure = Figure("climb", [Panel(title, lines, span=(0, 1), **shared)], size=(11, 5))
    return [figure, Figure("training", _curves(CURVES, climbing, **shared), columns=3, size=(4.5, 3.0))]


def pass_series(marks: Sequence[Record], at: Clock, colours: dict[str, int] | None = None) -> list[Series]:
    """Held-out pass@1 of each task with its interval. `colours`: by task; those not there are added."""
    colours = {} if colours is None else colours
    lines = []
    for task in parts_of(marks, PASS):
        told = [record for record in marks if PASS + task in record]
        low, high = ([record.get(f"pass@1_{end}/{task}", math.nan) for record in told] for end in ("low", "high"))
        colour, x, y = colours.setdefault(task, len(colours)), [at(r) for r in told], [r[PASS + task] for r in told]
        lines.append(Series(printable(task), x, y, low, high, colour=colour))
    return lines


def best_of(record: Record) -> str:
    """`pass@k` for the record's k."""
    counts = [int(match[1]) for name in record if (match := re.fullmatch(r"pass@(\d+)", name))]
    return f"pass@{max(counts, default=1)}"


def parts_of(marks: Sequence[Record], prefix: str) -> list[str]:
    """What follows `prefix` in the records' fields, in the order in which it first comes."""
    names = dict.fromkeys(name for record in marks for name in record if name.startswith(prefix))
    return [name.removeprefix(prefix) for name in names]


def _clock(stage: Run, begin: float) -> Clock:
    return lambda record: begin + stage.minutes * record["step"] / max(1, stage.steps_done)


def _points(records: Sequence[Record], field: str, at: Clock) -> tuple[list[float], list[float]]:
    told = [record for record in records if isinstance(record.get(field), int | float)]
    return [at(record) for record in told], [record[field] for record in told]


def _field(marks: Sequence[Record], field: str, name: str, at: Clock = by_step, **options: Any) -> Series:
    return Series(name, *_points(marks, field, at), **options)


def _curves(curves: dict[str, str], runs: Sequence[tuple[Run, Clock]], **options: Any) -> list[Panel]:
    """A panel for each number that the steps of some run have."""
    panels = []
    for field, title in curves.items():
        told = [_points(run.steps, field, at) for run, at in runs]
        lines = [line for x, y in told if (line := condensed(title, x, y, style="noisy", colour=0)).x]
        target = runs[0][0].config.get("objective", {}).get("target_entropy") if field == "entropy" else None
        guides = [] if target is None else [(target, "grey")]
        if lines:
            panels.append(Panel(title, lines, log_y=field in _LOG_Y, guides=guides, **options))
    return panels
