"""What a study leaves for people: each arm against the first, with the spread over its seeds."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from mai_thinking.config.study import StudyConfig
from mai_thinking.config.table import Cell, Interval, Table
from mai_thinking.errors import RunError
from mai_thinking.experiments.plan import ClimbPlan
from mai_thinking.report.comparison import spread, student
from mai_thinking.report.document import Document
from mai_thinking.report.figures import Figure, Panel, Series
from mai_thinking.report.panels import best_of
from mai_thinking.training.metrics import Record, read_metrics

WHEN = {"at first": 0, "at last": -1}
"""Which evaluation is meant."""
Measured = Mapping[str, Sequence[tuple[list[Record], list[Record]]]]
"""By arm, seed by seed: steps and evaluations of its measured stage."""


def write_report(config: StudyConfig, plan: ClimbPlan) -> None:
    """`report/summary.md` and `summary.json`, and with the `plots` extra `arms.png`, of a study that is done."""
    measured = measure(config, plan)
    minutes = sum(stage.seconds for stage in plan.stages) / 60
    page = Document(config.name)
    page.add(f"{len(config.arms)} arms, seeds {', '.join(map(str, config.seeds))}, {minutes:.0f} minutes of work.")
    page.add_table("arms", table(config, measured))
    page.add(
        f"Held-out problems at the first and the last evaluation of `{config.measured}`: mean (least–most) over seeds. "
        f"The difference from `{config.arms[0].name}` is taken seed by seed, with Student's 95 % interval."
    )
    if found := claims(config, measured):
        page.facts["claims"] = found
        columns = ["arm", "metric", "expected", "effect", "low", "high", "verdict"]
        page.add_table("verdicts", Table(columns, [[claim[name] for name in columns] for claim in found]))
        page.add(
            "The effect is the arm's metric less that of the first arm, seed by seed, with Student's 95 % interval. "
            "The metric is of the last evaluation, or the mean over all steps where evaluations do not have it. "
            "*confirmed*: the interval lies on the expected side of 0; *reversed*: on the other; *not seen*: it has 0. "
            "*cannot be asked*: the same number to the last digit in every seed, since what differs never came to act."
        )
    names = {config.measured_stage(arm.name, seed) for arm in config.arms for seed in config.seeds}
    ended = [stage for stage in plan.stages if stage.name in names and stage.state == "collapsed"]
    page.add(*(f"`{stage.name}` (its last evaluation is of then) {stage.collapse}." for stage in ended))
    page.add_figures([_figure(config, measured)])
    page.write(plan.path / "report")


def measure(config: StudyConfig, plan: ClimbPlan) -> Measured:
    """RunError for a stage without an evaluation."""
    folders = {stage.name: stage.folder.path for stage in plan.stages}
    found: dict[str, list[tuple[list[Record], list[Record]]]] = {}
    for arm in config.arms:
        for name in (config.measured_stage(arm.name, seed) for seed in config.seeds):
            steps, marks = read_metrics(folders[name])
            if not marks:
                raise RunError(f"stage {name}: it has no evaluation; set evaluation.every")
            found.setdefault(arm.name, []).append((steps, marks))
    return found


def claims(config: StudyConfig, measured: Measured) -> list[dict[str, Any]]:
    """What the arms `expect`, with the effect, its 95 % interval over seeds and a verdict; RunError for a metric that a
    run does not have. A single seed gives no interval and no verdict."""
    found = []
    for arm in config.arms:
        for metric, expected in arm.expect.items():
            own, first = (_values(measured, name, metric) for name in (arm.name, config.arms[0].name))
            effect, low, high = student(_differences(own, first))
            verdict = verdict_of(low, high, expected) if own != first else "cannot be asked"
            found.append(
                {"arm": arm.name, "about": arm.about, "metric": metric, "expected": expected, "effect": effect}
                | {"low": low, "high": high, "verdict": verdict, "values": own, "values_of_first": first}
            )
    return found


def verdict_of(low: float | None, high: float | None, expected: str) -> str:
    """By where the interval of the effect lies."""
    if low is None or high is None:
        return "one seed"
    if low <= 0 <= high:
        return "not seen"
    return "confirmed" if (low > 0) == (expected == "higher") else "reversed"


def _values(measured: Measured, arm: str, metric: str, place: int = -1) -> list[float]:
    """Seed by seed, of one of the evaluations; the mean over the steps where evaluations do not have it."""
    found = []
    for steps, marks in measured[arm]:
        values = [marks[place][metric]] if metric in marks[place] else []
        values = values or [record[metric] for record in steps if metric in record]
        if not values:
            raise RunError(f"arm {arm}: its metrics have no {metric!r}; mend the arm's `expect`")
        found.append(fmean(values))
    return found


def table(config: StudyConfig, measured: Measured) -> Table:
    """An arm a row."""
    first = config.arms[0].name
    k = best_of(measured[first][0][1][0])
    columns = ["arm", "about", *(f"{name} {when}" for when in WHEN for name in ("pass@1", "difference", k))]
    rows: list[list[Cell]] = []
    for arm in config.arms:
        rows.append([arm.name, arm.about])
        for place in WHEN.values():
            own, other = (_values(measured, name, "pass@1", place) for name in (arm.name, first))
            away, low, high = student(_differences(own, other))
            interval = away if low is None or high is None else Interval(away, low, high)
            shown = None if arm.name == first else interval
            rows[-1] += [spread(own), shown, spread(_values(measured, arm.name, k, place))]
    return Table(columns, rows)


def _differences(own: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(own, other, strict=True)]


def _figure(config: StudyConfig, measured: Measured) -> Figure:
    """A dot a seed, and a dash for their mean."""
    lines = []
    for colour, (when, evaluation) in enumerate(WHEN.items()):
        for place, arm in enumerate(config.arms):
            x, values = place + 0.2 * (colour - 0.5), _values(measured, arm.name, "pass@1", evaluation)
            name = "" if place else f"{config.measured}, {when}"
            lines.append(Series("", [x] * len(values), values, style="dots", colour=colour))
            lines.append(Series(name, [x - 0.08, x + 0.08], [fmean(values)] * 2, colour=colour))
    panel = Panel("held-out pass@1", lines, x_name="", names=[arm.name for arm in config.arms])
    return Figure("arms", [panel], size=(2 + 1.2 * len(config.arms), 4))
