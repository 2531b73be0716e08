"""What a study leaves for people: each arm against the first, with the spread over its seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from mai_thinking.config.storage import atomic_file
from mai_thinking.config.study import StudyConfig
from mai_thinking.errors import RunError
from mai_thinking.experiments.plan import ClimbPlan
from mai_thinking.report.comparison import spread
from mai_thinking.training.metrics import Record, read_records
from mai_thinking.training.report import pyplot, save_figure

WHEN = ("at first", "at last")


@dataclass(frozen=True)
class Measurement:
    """Of one arm, seed by seed: held-out pass@1 and pass@k at the measured stage's first and last evaluation."""

    pass_1: dict[str, list[float]]
    pass_k: dict[str, list[float]]
    k: str
    """`pass@4`, say."""


def write_report(config: StudyConfig, plan: ClimbPlan) -> None:
    """`report/summary.md`, and with the `plots` extra `arms.png`, of a study that is done."""
    folder = plan.path / "report"
    folder.mkdir(exist_ok=True)
    measured = measure(config, plan)
    minutes = sum(stage.seconds for stage in plan.stages) / 60
    page = [
        f"# {config.name}",
        f"{len(config.arms)} arms, seeds {', '.join(map(str, config.seeds))}, {minutes:.0f} minutes of work.",
        table(config, measured),
        f"Held-out problems at the first and the last evaluation of `{config.measured}`: mean (least–most) over seeds. "
        f"The difference from `{config.arms[0].name}` is taken seed by seed; ± is its standard error.",
    ]
    page += collapses(config, plan)
    if _draw(config, measured, folder / "arms.png"):
        page.append("![pass@1 by arm](arms.png)")
    with atomic_file(folder / "summary.md") as path:
        path.write_text("\n\n".join(page) + "\n")


def measure(config: StudyConfig, plan: ClimbPlan) -> dict[str, Measurement]:
    """By arm, from the records of its measured stages."""
    found: dict[str, Measurement] = {}
    for arm in config.arms:
        ends = [_ends(plan, config.measured_stage(arm.name, seed)) for seed in config.seeds]
        k = next(name for name in ends[0][0] if name.startswith("pass@") and "/" not in name and name != "pass@1")
        by_time = [list(records) for records in zip(*ends, strict=True)]
        pass_1, pass_k = (
            {when: [record[name] for record in records] for when, records in zip(WHEN, by_time, strict=True)}
            for name in ("pass@1", k)
        )
        found[arm.name] = Measurement(pass_1, pass_k, k)
    return found


def _ends(plan: ClimbPlan, name: str) -> tuple[Record, Record]:
    stage = next(stage for stage in plan.stages if stage.name == name)
    marks = [record for record in read_records(stage.folder.metrics) if record.get("kind") == "evaluation"]
    if not marks:
        raise RunError(f"stage {name}: it has no evaluation; set evaluation.every")
    return marks[0], marks[-1]


def collapses(config: StudyConfig, plan: ClimbPlan) -> list[str]:
    """A line for each measured stage that ended before its time."""
    measured = {config.measured_stage(arm.name, seed) for arm in config.arms for seed in config.seeds}
    ended = [stage for stage in plan.stages if stage.name in measured and stage.state == "collapsed"]
    return [f"`{stage.name}` (its last evaluation is of then) {stage.collapse}." for stage in ended]


def table(config: StudyConfig, measured: dict[str, Measurement]) -> str:
    """In Markdown, an arm a row."""
    first = measured[config.arms[0].name]
    columns = [f"{name} {when}" for when in WHEN for name in ("pass@1", "difference", first.k)]
    lines = ["| arm | | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    for arm in config.arms:
        cells = []
        for when in WHEN:
            own, other = measured[arm.name].pass_1[when], first.pass_1[when]
            cells += [spread(own), "" if own is other else difference(own, other)]
            cells.append(spread(measured[arm.name].pass_k[when]))
        lines.append(f"| {arm.name} | {arm.about} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(own: Sequence[float], other: Sequence[float]) -> str:
    """The mean of the differences, seed by seed, with its standard error where there are several."""
    differences = [a - b for a, b in zip(own, other, strict=True)]
    error = f" ± {stdev(differences) / len(differences) ** 0.5:.3f}" if len(differences) > 1 else ""
    return f"{fmean(differences):+.3f}{error}"


def _draw(config: StudyConfig, measured: dict[str, Measurement], path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(figsize=(1.5 + 1.2 * len(config.arms), 4), layout="constrained")
    for index, when in enumerate(WHEN):
        for place, arm in enumerate(config.arms):
            values, x = measured[arm.name].pass_1[when], place + 0.2 * (index - 0.5)
            label = f"{config.measured}, {when}" if place == 0 else None
            axes.plot([x] * len(values), values, "o", color=f"C{index}", alpha=0.5, markersize=4)
            axes.plot([x - 0.08, x + 0.08], [fmean(values)] * 2, color=f"C{index}", linewidth=2, label=label)
    axes.set(ylabel="held-out pass@1", xticks=range(len(config.arms)), xticklabels=[arm.name for arm in config.arms])
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    save_figure(figure, path)
    return True
