"""A ladder's page: tables, figures and JSON of one analysis."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mai_thinking.experiments.scaling.analysis import Analysis, analyse, as_json
from mai_thinking.experiments.scaling.bootstrap import BootstrapFit, interval
from mai_thinking.experiments.scaling.crossings import HORIZON, Crossing
from mai_thinking.experiments.scaling.efficiency import RULE, Efficiency, Gain, gain_at, gain_replicates, next_cost
from mai_thinking.experiments.scaling.points import PointSet
from mai_thinking.report.document import Cell, Document, Table
from mai_thinking.report.figures import Figure, Panel, Series

UNITS = {"flops": "FLOPs", "seconds": "seconds"}
GAINS = {"flops": "EG_FLOPs", "seconds": "EG_Time"}
_GRID = 60
_SHOWN = 0.05, 20.0
"""Gains outside are drawn at these ends."""


def write_report(points: PointSet, folder: Path, title: str) -> str:
    """Analyse `points`; write `summary.md`, `summary.json` and the figures into `folder`; return the page."""
    points, again = points.once_each()
    analysis = analyse(points)
    page = Document(title)
    page.facts |= as_json(analysis) | {"given_twice": len(again)}
    runs = f"{len(points.points)} runs of {len(points.configs)} configs"
    page.add(f"Baseline `{points.baseline}`; {runs}. Intervals: 95 %.")
    if again:
        told = ", ".join(f"{point.config} seed {point.seed} at {point.flops:.3g} FLOPs" for point in again[:3])
        rest = f" and {len(again) - 3} more" if len(again) > 3 else ""
        page.add(f"Given twice, of which the first counts: {told}{rest}.")
    page.add(verdicts(analysis))
    page.add_figures(figures(analysis))
    page.add(*(gains_table(analysis, candidate) for candidate in analysis.candidates), heading="Efficiency gain")
    page.add(crossings_table(analysis), heading="Order and crossings")
    page.add(fits_table(list(analysis.fits.values())), heading="Fits of L = A·C^−α + E")
    page.add(runs_table(points), heading="Runs")
    return page.write(folder)


def verdicts(analysis: Analysis) -> str:
    """One line for each candidate, and the rule."""
    lines = ["## Verdict", ""]
    for candidate in analysis.candidates:
        gains = analysis.gains(candidate, analysis.points.headline)
        reasons = "; ".join(f"{GAINS[e.cost]}: {e.verdict[1]}" for e in gains)
        lines.append(f"- **{candidate}: {analysis.verdict(candidate)}** ({reasons})")
    return "\n".join([*lines, "", f"Rule: {RULE}"])


def gains_table(analysis: Analysis, candidate: str) -> str:
    """EG by score and cost, for each kind of cost."""
    parts = []
    for cost in analysis.points.costs:
        found = [e for e in analysis.efficiencies if e.candidate == candidate and e.cost == cost]
        parts.append(f"`{candidate}`, {GAINS[cost]} [interval]; by the rung's own mean loss\n\n" + _gain_rows(found))
    return "\n\n".join(parts)


def _gain_rows(efficiencies: list[Efficiency]) -> str:
    told = [e for e in efficiencies if e.problem is None]
    lines = [f"- {e.score}: no gain to tell. {e.problem}." for e in efficiencies if e.problem is not None]
    if told:
        by_rung = zip(*(e.gains for e in told), strict=True)
        rows = [[f"{gains[0].cost:.3g}", *map(_spell_gain, gains)] for gains in by_rung]
        table = Table([UNITS[told[0].cost], *(e.score for e in told)], rows)
        lines += ["", table.markdown(), "", "\\* beyond what was measured: the curves are continued"]
    return "\n".join(lines).strip()


def _spell_gain(gain: Gain) -> str:
    measured = "" if gain.measured is None else f"; {_number(gain.measured)}"
    mark = " \\*" if gain.beyond else ""
    return f"{_number(gain.value)} [{_number(gain.low)}, {_number(gain.high)}]{measured}{mark}"


def _number(value: float) -> str:
    return "∞" if value == float("inf") else f"{value:.3g}"


def crossings_table(analysis: Analysis) -> str:
    """A row for each pair, score and kind of cost."""
    columns = ["pair", "score", "cost", "better at each rung", "", "crossing [interval]", "a rung that would settle it"]
    return (
        f"Followed to {HORIZON:g} times the largest cost. Better at each rung, cheapest first; = is a tie within two "
        f"standard errors.\n\n{Table(columns, [_crossing_row(crossing) for crossing in analysis.crossings]).markdown()}"
    )


def _crossing_row(c: Crossing) -> list[str]:
    better = " ".join(rung.better or "=" for rung in c.rungs)
    at = settled = "–"
    if c.at is not None and c.low is not None and c.high is not None:
        ends = ("none" if abs(end) == float("inf") else f"{end:.3g}" for end in (c.low, c.high))
        at = f"{c.at:.3g} [{', '.join(ends)}], below it {c.better_below}"
    if c.settled_by is not None:
        settled = f"{c.settled_by:.3g}" + (f" (L{c.settled_depth})" if c.settled_depth else "")
    return [f"{c.first}, {c.second}", c.score, UNITS[c.cost], better, f"{c.status} ({c.method})", at, settled]


def fits_table(fits: Sequence[BootstrapFit]) -> str:
    """Parameters with their intervals, or what is in the way of a fit."""
    rows = []
    for fit in fits:
        curve, law, many = fit.curve, fit.law, fit.replicates
        row = [curve.config, curve.score, UNITS[curve.cost], f"{len(curve.costs_R)}, {curve.runs}"]
        if fit.problem is not None:
            rows.append([*row, "–", "–", "–", f"no fit: {fit.problem}"])
            continue
        for value, values in ((law.A, many.A), (law.alpha, many.alpha), (law.floor, many.floor)):
            low, high = interval(values)
            row.append(f"{float(value):.3g} [{low:.3g}, {high:.3g}]")
        rows.append([*row, "the rungs miss the law by more than the seeds explain" if fit.lack_of_fit else ""])
    return Table(["config", "score", "cost", "rungs, runs", "A", "α", "E", ""], rows).markdown()


def runs_table(points: PointSet) -> str:
    """Every point."""
    rows: list[list[Cell]] = []
    for rung in (rung for config in points.configs for rung in points.rungs(config)):
        for point in sorted(rung, key=lambda point: point.seed):
            depth = "–" if point.rung is None else f"L{point.rung}"
            seconds = "–" if point.seconds is None else f"{point.seconds:.4g}"
            losses = [points.score(point, score) for score in points.scores]
            rows.append([point.config, depth, point.seed, f"{point.flops:.4g}", seconds, *losses])
    return Table(["config", "rung", "seed", "FLOPs", "seconds", *points.scores], rows, digits=4).markdown()


# ----------------------------------------------------------------------------------------------------------- figures


def figures(analysis: Analysis) -> list[Figure]:
    """Loss against cost with the fits, efficiency gain against cost, rank by rung."""
    found = []
    scores, size = analysis.points.scores, (5.0, 4.0)
    for cost in analysis.points.costs:
        losses = [_losses(analysis, score, cost) for score in scores]
        found.append(Figure(f"loss-{cost}", losses, columns=len(scores), size=size))
        if any(e.problem is None for e in analysis.efficiencies if e.cost == cost):
            gains = [_gains(analysis, score, cost) for score in scores]
            found.append(Figure(f"gain-{cost}", gains, columns=len(scores), size=size))
    return [*found, Figure("rank", [_ranks(analysis)], size=(6, 3.5))]


def _losses(analysis: Analysis, score: str, cost: str) -> Panel:
    fits = [analysis.fits[config, score, cost] for config in analysis.points.configs]
    costs = _costs(fits)
    lines = []
    for place, fit in enumerate(fits):
        x, y = fit.curve.flat
        lines.append(Series("", x.tolist(), y.tolist(), style="dots", colour=place))
        line = Series(fit.curve.config, [], [], colour=place)
        if fit.problem is None:
            low, high = zip(*(interval(fit.replicates.loss(x)) for x in costs), strict=True)
            line = replace(line, x=costs.tolist(), y=fit.law.loss(costs).tolist(), low=low, high=high)
        lines.append(line)
    return Panel(f"{score}: held-out loss", lines, x_name=f"training {UNITS[cost]}", log_x=True, log_y=True)


def _gains(analysis: Analysis, score: str, cost: str) -> Panel:
    baseline = analysis.fits[analysis.points.baseline, score, cost]
    lines, largest = [], []
    for place, config in enumerate(analysis.candidates, start=1):
        candidate = analysis.fits[config, score, cost]
        if baseline.problem is not None or candidate.problem is not None:
            continue
        costs, measured = _costs([candidate]), candidate.curve.costs_R
        ends = np.array([interval(gain_replicates(baseline, candidate, x)) for x in costs])
        low, high = np.clip(ends.T, *_SHOWN).tolist()
        gains = np.clip(gain_at(baseline, candidate, costs), *_SHOWN).tolist()
        lines.append(Series(config, costs.tolist(), gains, low, high, colour=place))
        own = baseline.law.cost(np.exp(candidate.curve.log_means_R)) / measured
        lines.append(Series("", measured.tolist(), np.clip(own, *_SHOWN).tolist(), style="dots", colour=place))
        largest.append((float(measured[-1]), ""))
    labels: dict[str, Any] = {"x_name": f"training {UNITS[cost]}", "log_x": True, "log_y": True}
    return Panel(f"{score}: efficiency gain", lines, guides=[(1.0, None)], marks=largest, **labels)


def _ranks(analysis: Analysis) -> Panel:
    """The place of each config at each rung, 1 being the lowest mean loss."""
    points = analysis.points
    fits = [analysis.fits[config, points.headline, "flops"] for config in points.configs]
    rungs = min(len(fit.curve.costs_R) for fit in fits)
    places = np.array([fit.curve.log_means_R[:rungs] for fit in fits]).argsort(0).argsort(0) + 1
    costs = [fit.curve.costs_R[:rungs].tolist() for fit in fits]
    lines = [Series(fit.curve.config, costs[i], places[i].tolist()) for i, fit in enumerate(fits)]
    span = (len(fits) + 0.3, 0.7)
    return Panel(f"{points.headline}: rank (1 is best)", lines, x_name="training FLOPs", log_x=True, span=span)


def _costs(fits: Sequence[BootstrapFit]) -> Any:
    smallest = min(fit.curve.costs_R[0] for fit in fits)
    largest = max(next_cost(f.curve.costs_R) if len(f.curve.costs_R) > 1 else f.curve.costs_R[0] for f in fits)
    return np.geomspace(smallest, largest, _GRID)
