"""What a study leaves for people: each arm against the first, with the spread over its seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from mai_thinking.config.study import StudyConfig
from mai_thinking.errors import RunError
from mai_thinking.experiments.plan import ClimbPlan
from mai_thinking.report.comparison import spread, student
from mai_thinking.report.document import Cell, Difference, Document, Table
from mai_thinking.report.figures import Figure, Panel, Series
from mai_thinking.report.panels import best_of
from mai_thinking.training.metrics import Record, read_metrics

WHEN = {"at first": 0, "at last": -1}
"""Which evaluation is meant."""


@dataclass(frozen=True)
class Measurement:
    """Of one arm, seed by seed: held-out pass@1 and pass@k at the measured stage's first and last evaluation."""

    pass_1: dict[str, list[float]]
    pass_k: dict[str, list[float]]
    k: str
    """`pass@4`, say."""


def write_report(config: StudyConfig, plan: ClimbPlan) -> None:
    """`report/summary.md` and `summary.json`, and with the `plots` extra `arms.png`, of a study that is done."""
    measured = measure(config, plan)
    minutes = sum(stage.seconds for stage in plan.stages) / 60
    page = Document(config.name)
    page.add(f"{len(config.arms)} arms, seeds {', '.join(map(str, config.seeds))}, {minutes:.0f} minutes of work.")
    page.add_table("arms", table(config, measured))
    page.add(
        f"Held-out problems at the first and the last evaluation of `{config.measured}`: mean (least–most) over seeds. "
        f"The difference from `{config.arms[0].name}` is taken seed by seed; ± is its standard error."
    )
    if found := claims(config, plan):
        page.facts["claims"] = found
        columns = ["arm", "metric", "expected", "effect", "low", "high", "verdict"]
        page.add_table("verdicts", Table(columns, [[claim[name] for name in columns] for claim in found]))
        page.add(
            "The effect is the arm's metric less that of the first arm, seed by seed, with Student's 95 % interval. "
            "The metric is of the last evaluation, or the mean over all steps where evaluations do not have it. "
            "*confirmed*: the interval lies on the expected side of 0; *reversed*: on the other; *not seen*: it has 0. "
            "*cannot be asked*: the same number to the last digit in every seed, since what differs never came to act."
        )
    page.add(*collapses(config, plan))
    page.add_figures([_figure(config, measured)])
    page.write(plan.path / "report")


def measure(config: StudyConfig, plan: ClimbPlan) -> dict[str, Measurement]:
    """By arm, from the records of its measured stages."""
    found: dict[str, Measurement] = {}
    for arm in config.arms:
        by_seed = [_metrics(plan, config.measured_stage(arm.name, seed))[1] for seed in config.seeds]
        k = best_of(by_seed[0][0])
        pass_1, pass_k = (
            {when: [marks[place][name] for marks in by_seed] for when, place in WHEN.items()} for name in ("pass@1", k)
        )
        found[arm.name] = Measurement(pass_1, pass_k, k)
    return found


def claims(config: StudyConfig, plan: ClimbPlan) -> list[dict[str, Any]]:
    """What the arms `expect`, with the effect, its 95 % interval over seeds and a verdict; RunError for a metric that a
    run does not have. A single seed gives no interval and no verdict."""
    found = []
    for arm in config.arms:
        for metric, expected in arm.expect.items():
            own, first = (
                [_value(plan, config.measured_stage(name, seed), metric) for seed in config.seeds]
                for name in (arm.name, config.arms[0].name)
            )
            effect, low, high = student([a - b for a, b in zip(own, first, strict=True)])
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


def _value(plan: ClimbPlan, name: str, metric: str) -> float:
    """Of the last evaluation; the mean over the steps where evaluations do not have it."""
    steps, marks = _metrics(plan, name)
    if metric in marks[-1]:
        return float(marks[-1][metric])
    values = [record[metric] for record in steps if metric in record]
    if not values:
        raise RunError(f"stage {name}: its metrics have no {metric!r}; mend the arm's `expect`")
    return fmean(values)


def _metrics(plan: ClimbPlan, name: str) -> tuple[list[Record], list[Record]]:
    """(steps, evaluations) of the stage `name`, which has at least one evaluation."""
    stage = next(stage for stage in plan.stages if stage.name == name)
    steps, marks = read_metrics(stage.folder.path)
    if not marks:
        raise RunError(f"stage {name}: it has no evaluation; set evaluation.every")
    return steps, marks


def collapses(config: StudyConfig, plan: ClimbPlan) -> list[str]:
    """A line for each measured stage that ended before its time."""
    measured = {config.measured_stage(arm.name, seed) for arm in config.arms for seed in config.seeds}
    ended = [stage for stage in plan.stages if stage.name in measured and stage.state == "collapsed"]
    return [f"`{stage.name}` (its last evaluation is of then) {stage.collapse}." for stage in ended]


def table(config: StudyConfig, measured: dict[str, Measurement]) -> Table:
    """An arm a row."""
    first = measured[config.arms[0].name]
    columns = ["arm", "about", *(f"{name} {when}" for when in WHEN for name in ("pass@1", "difference", first.k))]
    rows: list[list[Cell]] = []
    for arm in config.arms:
        rows.append([arm.name, arm.about])
        for when in WHEN:
            own, other = measured[arm.name].pass_1[when], first.pass_1[when]
            away = None if own is other else difference(own, other)
            rows[-1] += [spread(own), away, spread(measured[arm.name].pass_k[when])]
    return Table(columns, rows)


def difference(own: Sequence[float], other: Sequence[float]) -> Difference:
    """The mean of the differences, seed by seed, with its standard error where there are several."""
    differences = [a - b for a, b in zip(own, other, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return Difference(fmean(differences), error)


def _figure(config: StudyConfig, measured: dict[str, Measurement]) -> Figure:
    lines = []
    for index, when in enumerate(WHEN):
        values_of = [measured[arm.name].pass_1[when] for arm in config.arms]
        by_arm = [(place + 0.2 * (index - 0.5), values) for place, values in enumerate(values_of)]
        for x, values in by_arm:
            lines.append(Series("", [x] * len(values), values, style="dots", colour=index))
        for place, (x, values) in enumerate(by_arm):
            name = f"{config.measured}, {when}" if place == 0 else ""
            lines.append(Series(name, [x - 0.08, x + 0.08], [fmean(values)] * 2, colour=index))
    panel = Panel("held-out pass@1", lines, x_name="", names=[arm.name for arm in config.arms])
    return Figure("arms", [panel], size=(2 + 1.2 * len(config.arms), 4))
