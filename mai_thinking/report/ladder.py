"""A ladder's page: Markdown, figures and JSON of one analysis."""

import json
from pathlib import Path

from mai_thinking.config.storage import atomic_file
from mai_thinking.experiments.scaling.analysis import Analysis, analyse, as_json
from mai_thinking.experiments.scaling.bootstrap import BootstrapFit, interval
from mai_thinking.experiments.scaling.crossings import HORIZON, Crossing
from mai_thinking.experiments.scaling.efficiency import RULE, Efficiency, Gain
from mai_thinking.experiments.scaling.points import PointSet
from mai_thinking.report.ladder_figures import draw

UNITS = {"flops": "FLOPs", "seconds": "seconds"}
GAINS = {"flops": "EG_FLOPs", "seconds": "EG_Time"}


def write_report(points: PointSet, folder: Path, title: str) -> str:
    """Analyse `points`; write `summary.md`, `ladder.json` and the figures into `folder`; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    analysis = analyse(points)
    text = page(analysis, title, draw(analysis, folder))
    with atomic_file(folder / "summary.md") as path:
        path.write_text(text)
    with atomic_file(folder / "ladder.json") as path:
        path.write_text(json.dumps(as_json(analysis), indent=1) + "\n")
    return text


def page(analysis: Analysis, title: str, figures: list[str]) -> str:
    """The page as Markdown, `figures` by file name."""
    points = analysis.points
    sections = [
        f"# {title}",
        f"Baseline `{points.baseline}`; {len(points.points)} runs of {len(points.configs)} configs. Intervals: 95 %.",
        verdicts(analysis),
        *(f"![{name.removesuffix('.png')}]({name})" for name in figures),
        "## Efficiency gain\n\n" + "\n\n".join(gains_table(analysis, candidate) for candidate in analysis.candidates),
        "## Order and crossings\n\n" + crossings_table(analysis),
        "## Fits of L = A·C^−α + E\n\n" + fits_table(list(analysis.fits.values())),
        "## Runs\n\n" + runs_table(points),
    ]
    return "\n\n".join(sections) + "\n"


def verdicts(analysis: Analysis) -> str:
    """One line for each candidate, and the rule."""
    score = analysis.points.headline
    lines = ["## Verdict", ""]
    for candidate in analysis.candidates:
        reasons = "; ".join(f"{GAINS[e.cost]}: {e.verdict[1]}" for e in analysis.gains(candidate, score))
        lines.append(f"- **{candidate}: {analysis.verdict(candidate)}** ({reasons})")
    return "\n".join([*lines, "", f"Rule: {RULE}"])


def gains_table(analysis: Analysis, candidate: str) -> str:
    """EG by score and cost, for each kind of cost."""
    parts = []
    for cost in analysis.points.costs:
        efficiencies = [e for e in analysis.efficiencies if e.candidate == candidate and e.cost == cost]
        parts.append(
            f"`{candidate}`, {GAINS[cost]} [interval]; by the rung's own mean loss\n\n" + _gain_rows(efficiencies)
        )
    return "\n\n".join(parts)


def _gain_rows(efficiencies: list[Efficiency]) -> str:
    told = [e for e in efficiencies if e.problem is None]
    lines = [f"- {e.score}: no gain to tell. {e.problem}." for e in efficiencies if e.problem is not None]
    if told:
        lines += ["", f"| {UNITS[told[0].cost]} | " + " | ".join(e.score for e in told) + " |"]
        lines.append("|---:|" + "---:|" * len(told))
        for gains in zip(*(e.gains for e in told), strict=True):
            lines.append(f"| {gains[0].cost:.3g} | " + " | ".join(_spell_gain(gain) for gain in gains) + " |")
        lines += ["", "\\* beyond what was measured: the curves are continued"]
    return "\n".join(lines).strip()


def _spell_gain(gain: Gain) -> str:
    measured = "" if gain.measured is None else f"; {_number(gain.measured)}"
    mark = " \\*" if gain.beyond else ""
    return f"{_number(gain.value)} [{_number(gain.low)}, {_number(gain.high)}]{measured}{mark}"


def _number(value: float) -> str:
    return "∞" if value == float("inf") else f"{value:.3g}"


def crossings_table(analysis: Analysis) -> str:
    """A row for each pair, score and kind of cost."""
    lines = [
        f"Followed to {HORIZON:g} times the largest cost. Better at each rung, cheapest first; = is a tie within two "
        "standard errors.",
        "",
        "| pair | score | cost | better at each rung | | crossing [interval] | a rung that would settle it |",
        "|---|---|---|---|---|---:|---:|",
    ]
    return "\n".join(lines + [_crossing_row(crossing) for crossing in analysis.crossings])


def _crossing_row(c: Crossing) -> str:
    better = " ".join(rung.better or "=" for rung in c.rungs)
    at = "–"
    if c.at is not None and c.low is not None and c.high is not None:
        ends = ("none" if abs(end) == float("inf") else f"{end:.3g}" for end in (c.low, c.high))
        at = f"{c.at:.3g} [{', '.join(ends)}], below it {c.better_below}"
    settled = (
        "–" if c.settled_by is None else f"{c.settled_by:.3g}" + (f" (L{c.settled_depth})" if c.settled_depth else "")
    )
    status = f"{c.status} ({c.method})"
    return f"| {c.first}, {c.second} | {c.score} | {UNITS[c.cost]} | {better} | {status} | {at} | {settled} |"


def fits_table(fits: list[BootstrapFit]) -> str:
    """Parameters with their intervals, or what is in the way of a fit."""
    lines = ["| config | score | cost | rungs, runs | A | α | E | |", "|---|---|---|---|---:|---:|---:|---|"]
    for fit in fits:
        curve = fit.curve
        head = f"| {curve.config} | {curve.score} | {UNITS[curve.cost]} | {len(curve.costs_R)}, {curve.runs} "
        if fit.problem is not None:
            lines.append(head + f"| – | – | – | no fit: {fit.problem} |")
            continue
        law, many = fit.law, fit.replicates
        cells = [(law.A, many.A), (law.alpha, many.alpha), (law.floor, many.floor)]
        told = " | ".join(
            f"{float(value):.3g} [{low:.3g}, {high:.3g}]"
            for value, (low, high) in ((value, interval(values)) for value, values in cells)
        )
        note = "the rungs miss the law by more than the seeds explain" if fit.lack_of_fit else ""
        lines.append(head + f"| {told} | {note} |")
    return "\n".join(lines)


def runs_table(points: PointSet) -> str:
    """Every point."""
    lines = ["| config | rung | seed | FLOPs | seconds | " + " | ".join(points.scores) + " |"]
    lines.append("|---|---:|---:|---:|---:|" + "---:|" * len(points.scores))
    for config in points.configs:
        for rung in points.rungs(config):
            for point in sorted(rung, key=lambda point: point.seed):
                depth = "–" if point.rung is None else f"L{point.rung}"
                seconds = "–" if point.seconds is None else f"{point.seconds:.4g}"
                losses = " | ".join(f"{points.score(point, score):.4f}" for score in points.scores)
                lines.append(f"| {config} | {depth} | {point.seed} | {point.flops:.4g} | {seconds} | {losses} |")
    return "\n".join(lines)
