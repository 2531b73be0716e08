"""A ladder's figures: loss against cost with the fits, efficiency gain against cost, rank by rung."""

from pathlib import Path
from typing import Any

import numpy as np

from mai_thinking.config.storage import atomic_file
from mai_thinking.experiments.scaling.analysis import Analysis
from mai_thinking.experiments.scaling.bootstrap import BootstrapFit, interval
from mai_thinking.experiments.scaling.efficiency import gain_at, gain_replicates, next_cost

LABELS = {"flops": "training FLOPs", "seconds": "training seconds"}
_POINTS = 60


def draw(analysis: Analysis, folder: Path) -> list[str]:
    """The figures as PNG into `folder`; returns their names, none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: install matplotlib, or mai_thinking[plots]")
        return []
    matplotlib.use("Agg")
    names = []
    for cost in analysis.points.costs:
        _draw_losses(analysis, cost, folder / f"loss-{cost}.png")
        names.append(f"loss-{cost}.png")
        if any(e.problem is None for e in analysis.efficiencies if e.cost == cost):
            _draw_gains(analysis, cost, folder / f"gain-{cost}.png")
            names.append(f"gain-{cost}.png")
    _draw_ranks(analysis, folder / "rank.png")
    return [*names, "rank.png"]


def _grid(fits: list[BootstrapFit]) -> Any:
    smallest = min(fit.curve.costs_R[0] for fit in fits)
    largest = max(next_cost(e.curve.costs_R) if len(e.curve.costs_R) > 1 else e.curve.costs_R[0] for e in fits)
    return np.geomspace(smallest, largest, _POINTS)


def _draw_losses(analysis: Analysis, cost: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    scores = analysis.points.scores
    figure, axes = plt.subplots(1, len(scores), figsize=(5 * len(scores), 4), layout="constrained", squeeze=False)
    for axis, score in zip(axes[0], scores, strict=True):
        fits = [analysis.fits[config, score, cost] for config in analysis.points.configs]
        grid = _grid(fits)
        for index, fit in enumerate(fits):
            costs, losses = fit.curve.flat
            axis.plot(costs, losses, "o", markersize=4, color=f"C{index}", label=fit.curve.config)
            if fit.problem is None:
                axis.plot(grid, fit.law.loss(grid), color=f"C{index}", linewidth=1)
                ends = np.array([interval(fit.replicates.loss(x)) for x in grid])
                axis.fill_between(grid, ends[:, 0], ends[:, 1], color=f"C{index}", alpha=0.15, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel=LABELS[cost], ylabel="held-out loss", title=score)
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    _save(figure, path)


def _draw_gains(analysis: Analysis, cost: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    scores = analysis.points.scores
    figure, axes = plt.subplots(1, len(scores), figsize=(5 * len(scores), 4), layout="constrained", squeeze=False)
    for axis, score in zip(axes[0], scores, strict=True):
        baseline = analysis.fits[analysis.points.baseline, score, cost]
        for index, config in enumerate(analysis.candidates, start=1):
            candidate = analysis.fits[config, score, cost]
            if baseline.problem is not None or candidate.problem is not None:
                continue
            grid = _grid([candidate])
            ends = np.array([interval(gain_replicates(baseline, candidate, x)) for x in grid])
            axis.plot(grid, gain_at(baseline, candidate, grid), color=f"C{index}", label=config)
            axis.fill_between(grid, ends[:, 0], ends[:, 1], color=f"C{index}", alpha=0.2, linewidth=0)
            measured = baseline.law.cost(np.exp(candidate.curve.log_means_R)) / candidate.curve.costs_R
            axis.plot(candidate.curve.costs_R, measured, "o", markersize=4, color=f"C{index}")
            axis.axvline(candidate.curve.costs_R[-1], color="grey", linestyle=":", linewidth=0.8)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel=LABELS[cost], ylabel="efficiency gain", title=score)
        axis.set_ylim(max(axis.get_ylim()[0], 0.05), min(axis.get_ylim()[1], 20))
        axis.grid(alpha=0.3, which="both")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    _save(figure, path)


def _draw_ranks(analysis: Analysis, path: Path) -> None:
    """The place of each config at each rung, 1 being the lowest mean loss."""
    from matplotlib import pyplot as plt

    points = analysis.points
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    fits = [analysis.fits[config, points.headline, "flops"] for config in points.configs]
    rungs = min(len(fit.curve.costs_R) for fit in fits)
    means = np.array([fit.curve.log_means_R[:rungs] for fit in fits])
    places = means.argsort(0).argsort(0) + 1
    for index, fit in enumerate(fits):
        axis.plot(fit.curve.costs_R[:rungs], places[index], "o-", color=f"C{index}", label=fit.curve.config)
    axis.set(xscale="log", xlabel=LABELS["flops"], ylabel="rank (1 is best)", title=points.headline)
    axis.set_yticks(range(1, len(fits) + 1))
    axis.invert_yaxis()
    axis.legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
