"""Runs side by side: groups of seeds, a panel a metric, each group's mean with the span of its runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mai_thinking.errors import UsageError
from mai_thinking.training.metrics import Record, read_records
from mai_thinking.training.report import pyplot, save_figure, smooth

Curves = list[list[tuple[int, float]]]
"""Of each run of a group: (step, value)."""


def compare(groups: Mapping[str, Sequence[Path]], metrics: Sequence[str], figure: Path) -> str:
    """Draw `figure` (PNG) and return a Markdown table: each metric's last value, mean and span over a group's runs.

    `groups` is label → run folders. A metric is a field of metrics.jsonl, of its steps or its evaluations. Raises
    UsageError for a run without metrics or a metric that a run does not have.
    """
    curves = {
        metric: {label: [_curve(run, metric) for run in runs] for label, runs in groups.items()} for metric in metrics
    }
    _draw(curves, figure)
    lines = ["| runs | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for label in groups:
        cells = [spread([curve[-1][1] for curve in curves[metric][label]]) for metric in metrics]
        lines.append(f"| {label} ({len(groups[label])}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_groups(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """`LABEL=RUN,RUN …`, or plain runs, each a group of its own."""
    groups: dict[str, list[Path]] = {}
    for argument in arguments:
        label, separator, runs = argument.partition("=")
        if not separator:
            label, runs = Path(argument).name, argument
        groups[label] = [Path(run) for run in runs.split(",")]
    return groups


def _curve(run: Path, metric: str) -> list[tuple[int, float]]:
    records = read_records(run / "metrics.jsonl")
    if not records:
        raise UsageError(f"{run}: no metrics.jsonl with records; name the output_dir of a run")
    having = [record for record in records if _number(record, metric)]
    # Steps and evaluations may both have it: response_length, say. Only one of them is a curve.
    having = [record for record in having if "kind" not in record] or having
    curve = [(record["step"], float(record[metric])) for record in having]
    if not curve:
        raise UsageError(f"{run}: no metric {metric!r}; there are {', '.join(_numbers(records))}")
    return curve


def _number(record: Record, metric: str) -> bool:
    return isinstance(record.get(metric), int | float)


def _numbers(records: Sequence[Record]) -> list[str]:
    return sorted({name for record in records for name in record if _number(record, name)})


def spread(values: Sequence[float]) -> str:
    """The mean of several runs' values, with the least and the most."""
    return f"{fmean(values):.3f} ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else f"{values[0]:.3f}"


def _draw(curves: Mapping[str, Mapping[str, Curves]], path: Path) -> None:
    plt = pyplot()
    if plt is None:
        return
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    size = (5 * columns, 3.6 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, (metric, groups) in zip(grid.flat, curves.items(), strict=False):
        for index, (label, runs) in enumerate(groups.items()):
            _draw_group(axes, label, runs, f"C{index}")
        axes.set(title=metric, xlabel="step")
        axes.grid(alpha=0.3)
    grid.flat[0].legend(fontsize=8)
    for axes in list(grid.flat)[len(curves) :]:
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _draw_group(axes: Any, label: str, runs: Curves, color: str) -> None:
    """Mean and span at the steps that all runs have; a dense curve is smoothed first."""
    shared = sorted(set.intersection(*({step for step, _ in run} for run in runs)))
    by_run = [[value for step, value in run if step in set(shared)] for run in runs]
    if len(shared) > 60:
        by_run = [smooth(values, keep=0.9) for values in by_run]
    columns = list(zip(*by_run, strict=True))
    axes.plot(shared, [fmean(column) for column in columns], color=color, label=label)
    if len(runs) > 1:
        low, high = ([pick(column) for column in columns] for pick in (min, max))
        axes.fill_between(shared, low, high, color=color, alpha=0.2, linewidth=0)
