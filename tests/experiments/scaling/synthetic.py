"""Ladders with known answers."""

from collections.abc import Sequence

import numpy as np

from mai_thinking.experiments.scaling.points import Point, PointSet
from mai_thinking.experiments.scaling.power_law import Array, PowerLaw

REFERENCE = 1e14
"""Where the laws' A is given; costs run from a tenth of it to a hundred times."""


def law(at_reference: float, alpha: float, floor: float) -> PowerLaw:
    """L = at_reference·(C/1e14)^−α + floor."""
    return PowerLaw(np.log(np.array(at_reference)), np.array(alpha), np.array(floor), REFERENCE)


def times(one: PowerLaw, gain: float) -> PowerLaw:
    """The law that needs 1/gain of the cost for the same loss."""
    return law(float(np.exp(one.log_scale)) * gain ** -float(one.alpha), float(one.alpha), float(one.floor))


def points_of(
    laws: dict[str, PowerLaw],
    rng: np.random.Generator,
    *,
    rungs: int = 5,
    seeds: int = 3,
    noise: float = 0.003,
    seconds: dict[str, float] | None = None,
) -> PointSet:
    """Points on `laws` (the first is the baseline) with log-normal noise; `seconds` per 1e12 FLOPs of each config."""
    points = []
    for name, one in laws.items():
        for depth, cost in enumerate(np.geomspace(1e13, 1e16, rungs), start=1):
            for seed in range(seeds):
                loss = float(one.loss(cost) * np.exp(noise * rng.standard_normal()))
                time = None if seconds is None else seconds[name] * cost / 1e12
                points.append(
                    Point(config=name, seed=seed, flops=float(cost), seconds=time, loss={"loss": loss}, rung=2 * depth)
                )
    return PointSet(baseline=next(iter(laws)), points=tuple(points))


def from_means(losses: dict[str, Sequence[float]], spread: float, costs: Array) -> PointSet:
    """Two seeds on either side of given means."""
    points = [
        Point(config=name, seed=seed, flops=float(cost), loss={"loss": mean * float(np.exp(side * spread))})
        for name, means in losses.items()
        for cost, mean in zip(costs, means, strict=True)
        for seed, side in enumerate((-1, 1))
    ]
    return PointSet(baseline=next(iter(losses)), points=tuple(points))
