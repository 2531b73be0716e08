"""Which figures a run gets, in its Markdown page as in its HTML page: those that its records have numbers for.

A panel takes runs in a row, each with a clock: a whole climb is drawn as a run is.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mai_thinking.errors import printable
from mai_thinking.report.figures import PALETTE, Figure, Panel, Series, Style, condensed, shade
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
        Figure("thought", thought_panels([marks])),
        Figure("size", size_panels(marks)),
    ]
    if categories := parts_of(marks, BITS):
        yardsticks = run.notes.get("compressors", {})
        bits = lines([(marks, by_step)], {BITS + category: category for category in categories})
        guides = [(yardsticks[c]["xz"], PALETTE[i]) for i, c in enumerate(categories) if c in yardsticks]
        title = "Held-out bits per byte" + (" (dashed: xz -9e)" if guides else "")
        figures.append(Figure("bits_per_byte", [Panel(title, bits, guides=guides)]))
    return figures


def thought_panels(runs: Sequence[Sequence[Record]]) -> list[Panel]:
    """Whether the thought decides the answer, by the evaluations of one run or of several seeds: pass@1 with the
    model's own, half of it, another's and none, in all and by task; and how many responses have one."""
    tracks, tasks = [(marks, by_step) for marks in runs], parts_of(runs[0], PASS)
    panels = []
    for suffix in ("", *(f"/{task}" for task in tasks if len(tasks) > 1)):
        passed = lines(tracks, {name + suffix: title for name, title in THOUGHTS.items()})
        title = f"{printable(suffix[1:])}: pass@1 by thought" if suffix else "Held-out pass@1 by thought"
        if any(series.name != THOUGHTS["pass@1"] for series in passed):
            panels.append(Panel(title, passed, span=(0, 1)))
    shares = lines(tracks, {f"thought_share/{task}": printable(task) for task in tasks})
    if shares := shares or lines(tracks, {"thought_share": "all"}):
        panels.insert(1, Panel("Share of responses with a thought", shares, span=(0, 1.02)))
    return panels


def size_panels(marks: Sequence[Record]) -> list[Panel]:
    """Pass rate and response length by the problem's size, two panels a task, a line a size."""
    sizes: dict[str, list[int]] = {}
    for part in parts_of(marks, "pass@1_size/"):
        task, _, size = part.rpartition("/")
        sizes.setdefault(task, []).append(int(size))
    panels = []
    for task, found in sizes.items():
        colours = [shade(place, len(found)) for place in range(len(found))]
        for field, title in (("pass@1_size", "pass@1 by size"), ("response_length_size", "response length by size")):
            names = {f"{field}/{task}/{size}": str(size) for size in sorted(found)}
            span = (0.0, 1.0) if field == "pass@1_size" else None
            told = lines([(marks, by_step)], names, colours)
            panels.append(Panel(f"{printable(task)}: {title}", told, span=span))
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
    steps, layers = [record["step"] for record in told], len(told[0]["violation"])
    by_layer = []
    for layer in range(layers):
        name = f"MoE {layer + 1}" if layers <= 8 or layer in (0, layers - 1) else ""
        rates = condensed(name, steps, [record["violation"][layer] for record in told], colour=shade(layer, layers))
        by_layer.append(replace(rates, low=(), high=()))
    panel = Panel("Violation rate by layer: the busiest expert's load over the mean, less 1", by_layer, log_y=True)
    return [Figure("expert_load", [panel, *_curves(LOAD, [(run, by_step)])], size=(5.5, 3.0))]


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
    passed: list[Series] = []
    colours: dict[str, int] = {}  # a task keeps its own
    for stage, clock in climbing:
        passed += pass_series(stage.evaluations, clock, colours)
        names = {f"{best_of(stage.evaluations[-1])}/{task}": "" for task in parts_of(stage.evaluations, PASS)}
        own = [colours[name.partition("/")[2]] for name in names]
        passed += lines([(stage.evaluations, clock)], names, own, style="dotted")
    shared: dict[str, Any] = {"x_name": "minutes of work", "marks": marks, "bands": bands}
    title = "Held-out pass@1, with 95 % intervals (dotted: pass@k; shaded: self-distillation)"
    figure = Figure("climb", [Panel(title, passed, span=(0, 1), **shared)], size=(11, 5))
    return [figure, Figure("training", _curves(CURVES, climbing, **shared), columns=3, size=(4.5, 3.0))]


def pass_series(marks: Sequence[Record], at: Clock, colours: dict[str, int] | None = None) -> list[Series]:
    """Held-out pass@1 of each task with its interval. `colours`: by task; those not there are added."""
    colours = {} if colours is None else colours
    found = []
    for task in parts_of(marks, PASS):
        told = [record for record in marks if PASS + task in record]
        low, high = ([record.get(f"pass@1_{end}/{task}", math.nan) for record in told] for end in ("low", "high"))
        colour, x, y = colours.setdefault(task, len(colours)), [at(r) for r in told], [r[PASS + task] for r in told]
        found.append(Series(printable(task), x, y, low, high, colour=colour))
    return found


def lines(
    tracks: Sequence[tuple[Sequence[Record], Clock]],
    names: Mapping[str, str],
    colours: Sequence[int | str] = (),
    style: Style = "line",
) -> list[Series]:
    """A line for each field in `names` and each run that has it, by its records and clock. A field has one colour, its
    place's unless `colours` say so."""
    found = []
    for (field, name), colour in zip(names.items(), colours or range(len(names)), strict=True):
        for records, at in tracks:
            if told := [record for record in records if isinstance(record.get(field), int | float)]:
                x, y = [at(record) for record in told], [record[field] for record in told]
                found.append(condensed(name, x, y, style=style, colour=colour))
    return found


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


def _curves(curves: dict[str, str], runs: Sequence[tuple[Run, Clock]], **options: Any) -> list[Panel]:
    """A panel for each number that the steps of some run have."""
    panels = []
    for field, title in curves.items():
        told = lines([(run.steps, at) for run, at in runs], {field: title})
        target = runs[0][0].config.get("objective", {}).get("target_entropy") if field == "entropy" else None
        guides = [] if target is None else [(target, "grey")]
        if told:
            panels.append(Panel(title, told, log_y=field in _LOG_Y, guides=guides, **options))
    return panels
