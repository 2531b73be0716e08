"""Which charts a run gets: those that its records have numbers for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mai_thinking.report.charts import Chart, Series, condensed, heat_map, line_chart
from mai_thinking.report.reading import Run
from mai_thinking.training.metrics import Record

PASS, BITS = "pass@1/", "bits_per_byte/"


@dataclass(frozen=True)
class Panel:
    """A number of the step records, over steps."""

    field: str
    title: str
    logarithmic: bool = False


CURVES = (
    Panel("loss", "Loss"),
    Panel("pass_rate", "Pass rate of the groups learned from"),
    Panel("reward", "Reward"),
    Panel("entropy", "Entropy Ĥ, nats a token"),
    Panel("clip_relaxation", "k, the trust region's relaxation"),
    Panel("response_length", "Response length, tokens"),
    Panel("cut_off", "Share of responses cut off"),
    Panel("repetition", "Share of responses that loop"),
    Panel("rollouts_used", "Share of rollouts learned from"),
    Panel("mismatch", "Mismatch, learner against engine", logarithmic=True),
    Panel("grad_norm", "Gradient norm", logarithmic=True),
    Panel("lr", "Learning rate"),
    Panel("tokens_per_second", "Tokens a second"),
)
LOAD = (
    Panel("violation_max", "Violation rate, worst layer", logarithmic=True),
    Panel("dead_experts", "Experts that no token chose"),
    Panel("router_entropy", "Router entropy, nats"),
)


def held_out(run: Run) -> list[Chart]:
    """What the run's evaluations say of text or problems that it has not seen."""
    charts = [
        line_chart("Held-out pass@1, with 95 % intervals", pass_series(run.evaluations), span=(0, 1)),
        line_chart("Held-out bits per byte", _by_prefix(run.evaluations, BITS)),
    ]
    return [chart for chart in charts if chart]


def curves(run: Run) -> list[Chart]:
    """The numbers of its steps."""
    target = run.config.get("objective", {}).get("target_entropy")
    charts = [_curve(run.steps, panel, target if panel.field == "entropy" else None) for panel in CURVES]
    return [chart for chart in charts if chart]


def load(run: Run) -> list[Chart]:
    """How evenly the routers spread the tokens over the experts, over time."""
    told = [record for record in run.steps if record.get("violation")]
    charts: list[Chart | None] = []
    if told:
        layers = [f"MoE {index + 1}" for index in range(len(told[0]["violation"]))]
        steps, values = [record["step"] for record in told], [record["violation"] for record in told]
        charts.append(heat_map("Violation rate by layer", layers, steps, values))
    charts += [_curve(run.steps, panel, None) for panel in LOAD]
    return [chart for chart in charts if chart]


def pass_series(evaluations: Sequence[Record], x: Sequence[float] | None = None) -> list[Series]:
    """pass@1 of each task with its interval, over steps or the `x` given."""
    tasks = list(dict.fromkeys(name for record in evaluations for name in record if name.startswith(PASS)))
    lines = []
    for name in tasks:
        at = [index for index, record in enumerate(evaluations) if name in record]
        task = name.removeprefix(PASS)
        columns: dict[str, list[Any]] = {
            key: [evaluations[index][key] for index in at]
            for key in (name, f"pass@1_low/{task}", f"pass@1_high/{task}")
            if all(key in evaluations[index] for index in at)
        }
        places = [evaluations[index]["step"] if x is None else x[index] for index in at]
        lines.append(Series(task, places, *columns.values()))
    return lines


def _by_prefix(evaluations: Sequence[Record], prefix: str) -> list[Series]:
    names = list(dict.fromkeys(name for record in evaluations for name in record if name.startswith(prefix)))
    lines = []
    for name in names:
        told = [record for record in evaluations if name in record]
        lines.append(
            Series(name.removeprefix(prefix), [record["step"] for record in told], [record[name] for record in told])
        )
    return lines


def _curve(steps: Sequence[Record], panel: Panel, guide: float | None) -> Chart | None:
    told = [record for record in steps if isinstance(record.get(panel.field), int | float)]
    series = condensed(panel.title, [record["step"] for record in told], [record[panel.field] for record in told])
    logarithmic = panel.logarithmic and min(series.y, default=0) > 0
    return line_chart(panel.title, [series], logarithmic=logarithmic, guide=guide)
