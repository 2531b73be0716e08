"""Runs side by side: groups of seeds, a panel a metric, each group's mean with the span of its runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from mai_thinking.errors import UsageError
from mai_thinking.report.document import Cell, Interval, Table
from mai_thinking.report.figures import Figure, Panel, Series, save, smooth
from mai_thinking.training.metrics import Record, read_records

_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 97.5 %, by degrees of freedom; 1.96 beyond."""
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
    panels = [
        Panel(metric, [_mean(label, runs) for label, runs in by_label.items()]) for metric, by_label in curves.items()
    ]
    try:
        save(Figure(figure.stem, panels, columns=3, size=(5, 3.6)), figure)
    except OSError as error:
        raise UsageError(f"{figure}: cannot be written ({error.strerror}); name another place") from None
    rows: list[list[Cell]] = [
        [f"{label} ({len(runs)})", *(spread([curve[-1][1] for curve in curves[m][label]]) for m in metrics)]
        for label, runs in groups.items()
    ]
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
    mean, reach = fmean(values), _T_975.get(len(values) - 1, 1.96) * stdev(values) / len(values) ** 0.5
    return mean, mean - reach, mean + reach


def spread(values: Sequence[float]) -> Interval | float:
    """The mean of several runs' values, with the least and the most."""
    return Interval(fmean(values), min(values), max(values)) if len(values) > 1 else values[0]


def _curve(run: Path, metric: str) -> list[tuple[int, float]]:
    records = read_records(run / "metrics.jsonl")
    if not records:
        raise UsageError(f"{run}: no metrics.jsonl with records; name the output_dir of a run")
    having = [record for record in records if _number(record, metric)]
    # Steps and evaluations may both have it: response_length, say. Only one of them is a curve.
    having = [record for record in having if "kind" not in record] or having
    curve = [(record["step"], float(record[metric])) for record in having]
    if not curve:
        names = sorted({name for record in records for name in record if _number(record, name)})
        raise UsageError(f"{run}: no metric {metric!r}; there are {', '.join(names)}")
    return curve


def _number(record: Record, metric: str) -> bool:
    return isinstance(record.get(metric), int | float)


def _mean(label: str, runs: Curves) -> Series:
    """Mean and span at the steps that all runs have; a dense curve is smoothed first."""
    shared = sorted(set.intersection(*({step for step, _ in run} for run in runs)))
    by_run = [[value for step, value in run if step in set(shared)] for run in runs]
    if len(shared) > 60:
        by_run = [smooth(values) for values in by_run]
    columns = list(zip(*by_run, strict=True))
    low, high = ([pick(column) for column in columns] if len(runs) > 1 else [] for pick in (min, max))
    return Series(label, shared, [fmean(column) for column in columns], low, high)
