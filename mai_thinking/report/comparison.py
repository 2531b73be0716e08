"""Runs side by side: groups of seeds, a panel a metric, each group's mean with the span of its runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from mai_thinking.config.table import Cell, Interval, Table
from mai_thinking.errors import UsageError
from mai_thinking.experiments.scaling.gain import student as quantile
from mai_thinking.report.figures import Figure, Panel, Series, condensed, save
from mai_thinking.training.metrics import read_records

Curve = dict[int, float]
"""Step → value."""


def compare(groups: Mapping[str, Sequence[Path]], metrics: Sequence[str], figure: Path) -> str:
    """Draw `figure` (PNG) and return a Markdown table: each metric's last value, mean and span over a group's runs.

    `groups` is label → run folders. A metric is a field of metrics.jsonl, of its steps or its evaluations. Raises
    UsageError for a run without metrics or a metric that a run does not have.
    """
    panels = []
    rows: list[list[Cell]] = [[f"{label} ({len(runs)})"] for label, runs in groups.items()]
    for metric in metrics:
        lines = []
        for row, (label, runs) in zip(rows, groups.items(), strict=True):
            curves = [_curve(run, metric) for run in runs]
            row.append(spread([list(curve.values())[-1] for curve in curves]))
            lines.append(_mean(label, curves))
        panels.append(Panel(metric, lines))
    try:
        save(Figure(figure.stem, panels, columns=3, size=(5, 3.6)), figure)
    except OSError as error:
        raise UsageError(f"{figure}: cannot be written ({error.strerror}); name another place") from None
    return Table(["runs", *metrics], rows).markdown()


def parse_groups(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """`LABEL=RUN,RUN …`, or plain runs, each a group of its own."""
    groups: dict[str, list[Path]] = {}
    for argument in arguments:
        label, separator, runs = argument.partition("=")
        if not separator:
            label, runs = Path(argument).name, argument
        groups[label] = [Path(run) for run in runs.split(",")]
    return groups


def student(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean with Student's 95 % interval; a single value has none."""
    if len(values) < 2:
        return values[0], None, None
    mean, reach = fmean(values), quantile(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return mean, mean - reach, mean + reach


def spread(values: Sequence[float]) -> Interval | float:
    """The mean of several runs' values, with the least and the most."""
    return Interval(fmean(values), min(values), max(values)) if len(values) > 1 else values[0]


def _curve(run: Path, metric: str) -> Curve:
    records = read_records(run / "metrics.jsonl")
    if not records:
        raise UsageError(f"{run}: no metrics.jsonl with records; name the output_dir of a run")
    having = [record for record in records if isinstance(record.get(metric), int | float)]
    if not having:
        names = sorted({name for r in records for name, value in r.items() if isinstance(value, int | float)})
        raise UsageError(f"{run}: no metric {metric!r}; there are {', '.join(names)}")
    # Steps and evaluations may both have it: response_length, say. Only one of them is a curve.
    having = [record for record in having if "kind" not in record] or having
    return {record["step"]: float(record[metric]) for record in having}


def _mean(label: str, runs: Sequence[Curve]) -> Series:
    """Mean and span at the steps that all runs have, or over stretches of them."""
    shared = sorted(set.intersection(*map(set, runs)))
    by_run = [condensed(label, shared, [run[step] for step in shared]) for run in runs]
    columns = list(zip(*(line.y for line in by_run), strict=True))
    low, high = ([pick(column) for column in columns] if len(runs) > 1 else [] for pick in (min, max))
    return Series(label, by_run[0].x, [fmean(column) for column in columns], low, high)
