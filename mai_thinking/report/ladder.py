"""A ladder's page: tables, figures and JSON of one analysis."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from mai_thinking.config.table import Cell, Table
from mai_thinking.experiments.scaling.analysis import Analysis, analyse, as_json, ranked_right
from mai_thinking.experiments.scaling.baseline import BaselineFit, interval
from mai_thinking.experiments.scaling.crossings import Crossing
from mai_thinking.experiments.scaling.gain import RULE, spell
from mai_thinking.experiments.scaling.points import PointSet
from mai_thinking.report.document import Document
from mai_thinking.report.figures import Figure, Panel, Series

UNITS = {"flops": "FLOPs", "seconds": "seconds"}
GAINS = {"flops": "EG_FLOPs", "seconds": "EG_Time"}
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
    page.add(*_verdicts(analysis), heading="Verdict")
    page.add_figures(_figures(analysis))
    gains = [part for candidate in analysis.candidates for part in _gains(analysis, candidate)]
    page.add(*gains, heading="Efficiency gain")
    page.add(
        "Better at each rung, cheapest first; = where the gain's interval contains 1. Nothing is said of what lies "
        "beyond the largest rung.",
        _crossings(analysis.crossings).markdown(),
        heading="Order and crossings",
    )
    if len(points.configs) > 2:
        told = "Share of all pairs of configs that stand as at the largest rung, by mean loss."
        page.add(told, _ranking(points).markdown(), heading="Who would have ranked right")
    page.add(_fits(list(analysis.fits.values())).markdown(), heading="The baseline's law, L = A·C^−α + E")
    page.add(_runs(points).markdown(), heading="Runs")
    return page.write(folder)


def _verdicts(analysis: Analysis) -> Iterator[str]:
    """One line for each candidate, and the rule."""
    lines = []
    for candidate in analysis.candidates:
        told = [analysis.gain(candidate, cost) for cost in analysis.points.costs]
        reasons = "; ".join(f"{GAINS[e.cost]}: {e.verdict[1]}" for e in told)
        by_time = f"; by time alone {told[1].verdict[0]}" if len(told) > 1 else ""
        lines.append(f"- **{candidate}: {analysis.verdict(candidate)}** ({reasons}{by_time})")
    yield "\n".join(lines)
    kept = [e.kept_variance for c in analysis.candidates if (e := analysis.gain(c)).kept_variance is not None]
    if kept:
        spans = f"{1 - max(kept):.0%} to {1 - min(kept):.0%}" if len(kept) > 1 else f"{1 - kept[0]:.0%}"
        yield f"Pairs of one seed take {spans} off the variance of a difference of log losses."
    yield f"Rule: {RULE} The difference asked for: {analysis.points.difference:.0%}."


def _gains(analysis: Analysis, candidate: str) -> Iterator[str]:
    """EG by score, for each kind of cost."""
    for cost in analysis.points.costs:
        found = [e for e in analysis.efficiencies if e.candidate == candidate and e.cost == cost]
        yield f"`{candidate}`, {GAINS[cost]} [interval]"
        untold = [f"- {e.score}: no gain to tell. {e.problem}." for e in found if e.problem is not None]
        yield from ["\n".join(untold)] if untold else []
        told = [e for e in found if e.problem is None]
        if not told:
            continue
        rows = [
            [f"{gains[0].cost:.3g}", str(gains[0].pairs), *(spell(g) + (" \\*" if g.beyond else "") for g in gains)]
            for gains in zip(*(e.gains for e in told), strict=True)
        ]
        rows += [
            ["mean of the rungs", "", *(spell(e.mean) for e in told)],
            ["line, at the largest", "", *(spell(e.largest) for e in told)],
            ["× a decade of cost", "", *(spell(e.trend) for e in told)],
        ]
        yield Table([UNITS[cost], "pairs" if told[0].paired else "runs", *(e.score for e in told)], rows).markdown()
        yield "\\* beyond the baseline's lowest loss: its law is continued"


def _crossings(crossings: Sequence[Crossing]) -> Table:
    """A row for each candidate, score and kind of cost."""
    rows = []
    for c in crossings:
        at = "–"
        if c.at is not None and c.low is not None and c.high is not None:
            ends = ("none" if end == 0 or end == float("inf") else f"{end:.3g}" for end in (c.low, c.high))
            at = f"{c.at:.3g} [{', '.join(ends)}]"
        rows.append([c.candidate, c.score, UNITS[c.cost], " ".join(name or "=" for name in c.better), c.status, at])
    columns = ["candidate", "score", "cost", "better at each rung", "", "the gain goes through 1 at [interval]"]
    return Table(columns, rows)


def _ranking(points: PointSet) -> Table:
    """The share of pairs that each cheaper rung ranks as the largest does, and who is best at each."""
    rungs = [points.rungs(config) for config in points.configs]
    shared, right = min(map(len, rungs)), ranked_right(points)
    rows: list[list[Cell]] = []
    for place in range(-shared, 0):
        members = {config: own[place] for config, own in zip(points.configs, rungs, strict=True)}
        row: list[Cell] = [f"{members[points.baseline][0].flops:.3g}"]
        for score, shares in right.items():
            best = min(members, key=lambda config: fmean(points.score(p, score) for p in members[config]))
            row.append(best if place == -1 else f"{shares[place + shared]:.0%}, best {best}")
        rows.append(row)
    return Table(["FLOPs of the baseline", *points.scores], rows)


def _fits(fits: Sequence[BaselineFit]) -> Table:
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
    return Table(["config", "score", "cost", "rungs, runs", "A", "α", "E", ""], rows)


def _runs(points: PointSet) -> Table:
    """Every point."""
    rows: list[list[Cell]] = []
    for rung in (rung for config in points.configs for rung in points.rungs(config)):
        for point in sorted(rung, key=lambda point: point.seed):
            depth = "–" if point.rung is None else f"L{point.rung}"
            seconds = "–" if point.seconds is None else f"{point.seconds:.4g}"
            losses = [points.score(point, score) for score in points.scores]
            rows.append([point.config, depth, point.seed, f"{point.flops:.4g}", seconds, *losses])
    return Table(["config", "rung", "seed", "FLOPs", "seconds", *points.scores], rows, digits=4)


def _figures(analysis: Analysis) -> Iterator[Figure]:
    """Loss against cost with the baseline's law, and efficiency gain against cost."""
    scores = analysis.points.scores
    for cost in analysis.points.costs:
        panels = {"loss": [_loss_panel(analysis, score, cost) for score in scores]}
        if any(e.problem is None for e in analysis.efficiencies if e.cost == cost):
            panels["gain"] = [_gain_panel(analysis, score, cost) for score in scores]
        for name, found in panels.items():
            yield Figure(f"{name}-{cost}", found, columns=len(scores), size=(5.0, 4.0))


def _loss_panel(analysis: Analysis, score: str, cost: str) -> Panel:
    points, fit = analysis.points, analysis.fits[score, cost]
    lines = []
    for place, config in enumerate(points.configs):
        members = [point for point in points.points if point.config == config]
        losses = [points.score(point, score) for point in members]
        lines.append(Series("", [getattr(point, cost) for point in members], losses, style="dots", colour=place))
        lines.append(Series(config, [], [], colour=place))
    if fit.problem is None:
        costs = np.geomspace(fit.curve.costs_R[0], fit.curve.costs_R[-1], 60)
        low, high = zip(*(interval(fit.replicates.loss(x)) for x in costs), strict=True)
        lines.append(Series("", costs.tolist(), fit.law.loss(costs).tolist(), low=low, high=high, colour=0))
    return Panel(f"{score}: held-out loss", lines, x_name=f"training {UNITS[cost]}", log_x=True, log_y=True)


def _gain_panel(analysis: Analysis, score: str, cost: str) -> Panel:
    lines = []
    for place, candidate in enumerate(analysis.candidates, start=1):
        e = analysis.gain(candidate, cost, score)
        if e.problem is None:
            ends = [[getattr(gain, end) for gain in e.gains] for end in ("value", "low", "high")]
            value, low, high = np.clip(ends, *_SHOWN).tolist()
            lines.append(Series(candidate, [g.cost for g in e.gains], value, low, high, colour=place))
    title, axis = f"{score}: efficiency gain", f"training {UNITS[cost]}"
    return Panel(title, lines, x_name=axis, log_x=True, log_y=True, guides=[(1.0, "grey")])
