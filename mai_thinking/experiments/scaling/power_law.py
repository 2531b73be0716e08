"""The law of a ladder, L = A·C^−α + E: fits by the thousand at once (MAI-Thinking-1 report §2.2).

A fit minimises the Huber loss of log L − log L̂, as Hoffmann et al. (2022, §3.3) do, by damped Gauss-Newton steps with
the Huber weights of the current residuals. A bootstrap refits thousands of data sets that differ in nothing but noise,
so all of them take their steps together, as one batch of 3×3 systems.

Shape suffixes: N points, B data sets (or starts).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALPHA_BOUNDS = (0.01, 3.0)
"""Published exponents lie between 0.05 and 0.5. At a bound the points are a straight line or a step, not this law."""
_FLOOR_BOUNDS = (1e-4, 1.0)
"""E as a share of the lowest loss: the least stands for none."""
_HUBER = 1.345
"""Residuals beyond so many standard deviations count linearly: 95 % efficient where noise is normal."""
_LEAST_SCALE = 1e-5
_STEPS = 60


@dataclass(frozen=True)
class PowerLaw:
    """L(C) = A·C^−α + E, one law or a batch of B: each field is [] or [B].

    `log_scale` is log A at C = `reference`, where it is hardly correlated with α; `A` is that at C = 1.
    """

    log_scale: Array
    alpha: Array
    floor: Array
    """E."""
    reference: float
    """A cost in the middle of the points."""

    @property
    def A(self) -> Array:  # noqa: N802 - the report's letter
        """The factor of C^−α."""
        return np.asarray(np.exp(self.log_scale + self.alpha * np.log(self.reference)))

    def loss(self, cost: Array | float) -> Array:
        """L at `cost`, which broadcasts against the batch."""
        x = np.log(cost) - np.log(self.reference)
        return np.asarray(np.exp(self.log_scale - self.alpha * x) + self.floor)

    def cost(self, loss: Array | float) -> Array:
        """f⁻¹: the cost at which the law comes to `loss`; inf where `loss` is no higher than E."""
        above = np.asarray(loss) - self.floor
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            log_cost = np.log(self.reference) + (self.log_scale - np.log(above)) / self.alpha
            return np.where(above > 0, np.exp(log_cost), np.inf)

    def __getitem__(self, index: Any) -> "PowerLaw":
        """One law of the batch, or some of them."""
        return PowerLaw(self.log_scale[index], self.alpha[index], self.floor[index], self.reference)


def fit(costs_N: Array, losses_N: Array) -> PowerLaw:
    """The law through the points, the best of 20 starts; the caller knows whether they can support one."""
    lowest = losses_N.min()
    reference = float(np.exp(np.mean(np.log(costs_N))))
    x_N = np.log(costs_N / reference)
    starts = []
    for alpha in (0.05, 0.15, 0.3, 0.6, 1.2):
        for share in (0.01, 0.4, 0.7, 0.95):
            floor = share * lowest
            scale = np.median(np.log(np.maximum(losses_N - floor, 1e-12)) + alpha * x_N)
            starts.append((float(scale), alpha, np.log(floor)))
    start_B3 = np.array(starts)
    targets_BN = np.broadcast_to(np.log(losses_N), (len(starts), len(losses_N)))
    # First with the residuals' scale unknown (nearly least absolute deviations), then with it.
    rough_B3, objective_B = _descend(start_B3, x_N, targets_BN, 1e-3)
    residuals_N = np.log(losses_N) - _log_loss(rough_B3[objective_B.argmin()][None], x_N)[0]
    scale = max(_LEAST_SCALE, 1.4826 * float(np.median(np.abs(residuals_N))))
    refined_B3, objective_B = _descend(rough_B3, x_N, targets_BN, _HUBER * scale)
    return _law(refined_B3[objective_B.argmin()], reference)


def refit(law: PowerLaw, costs_N: Array, losses_BN: Array, scale: float) -> PowerLaw:
    """One law for each row of `losses_BN`, from `law` and from two starts beside it; `scale` is the noise's standard
    deviation in log L."""
    B, lowest_B = len(losses_BN), losses_BN.min(1)
    x_N = np.log(costs_N / law.reference)
    middle = float(law.loss(law.reference))
    starts = [(float(law.log_scale), float(law.alpha), float(np.log(law.floor)))]
    for factor, share in ((0.5, 0.02), (1.5, 0.9)):
        floor = share * float(np.median(lowest_B))
        starts.append((float(np.log(middle - floor)), factor * float(law.alpha), float(np.log(floor))))
    start_B3 = np.repeat(np.array(starts), B, axis=0)
    targets_BN = np.tile(np.log(losses_BN), (len(starts), 1))
    found_B3, objective_B = _descend(start_B3, x_N, targets_BN, _HUBER * max(scale, _LEAST_SCALE))
    best_B = objective_B.reshape(len(starts), B).argmin(0)
    return _law(found_B3.reshape(len(starts), B, 3)[best_B, np.arange(B)], law.reference)


def _law(theta: Array, reference: float) -> PowerLaw:
    return PowerLaw(theta[..., 0], theta[..., 1], np.exp(theta[..., 2]), reference)


def _log_loss(theta_B3: Array, x_N: Array) -> Array:
    scale, alpha, floor = (column[:, None] for column in theta_B3.T)
    return np.logaddexp(scale - alpha * x_N, floor)


def _huber(residuals_BN: Array, width: float) -> Array:
    size = np.abs(residuals_BN)
    return np.where(size <= width, 0.5 * size**2, width * (size - 0.5 * width)).sum(-1)


def _descend(theta_B3: Array, x_N: Array, targets_BN: Array, width: float) -> tuple[Array, Array]:
    """Damped Gauss-Newton (Levenberg-Marquardt) on the Huber loss within the bounds: (parameters, their losses)."""
    lowest_B = targets_BN.min(1)
    low_B3, high_B3 = (
        np.stack([lowest_B + scale, np.full_like(lowest_B, alpha), lowest_B + np.log(floor)], 1)
        for scale, alpha, floor in zip((-50, 50), ALPHA_BOUNDS, _FLOOR_BOUNDS, strict=True)
    )
    theta_B3 = np.clip(theta_B3, low_B3, high_B3)
    objective_B = _huber(targets_BN - _log_loss(theta_B3, x_N), width)
    damping_B = np.full(len(theta_B3), 1e-2)
    moving = np.arange(len(theta_B3))  # rows that still gain
    for _ in range(_STEPS):
        before_B3, before_B = theta_B3[moving], objective_B[moving]
        step_B3 = _newton_step(
            before_B3, x_N, targets_BN[moving], width, damping_B[moving], low_B3[moving], high_B3[moving]
        )
        tried_B3 = np.clip(before_B3 + np.clip(step_B3, -2.0, 2.0), low_B3[moving], high_B3[moving])
        tried_B = _huber(targets_BN[moving] - _log_loss(tried_B3, x_N), width)
        better_B = tried_B < before_B
        theta_B3[moving] = np.where(better_B[:, None], tried_B3, before_B3)
        objective_B[moving] = np.where(better_B, tried_B, before_B)
        damping_B[moving] *= np.where(better_B, 0.2, 5.0)
        slow_B = better_B & (before_B - tried_B < 1e-7 * before_B)
        moving = moving[~(slow_B | (damping_B[moving] > 1e6))]
        if not len(moving):
            break
    return theta_B3, objective_B


def _newton_step(
    theta_B3: Array, x_N: Array, targets_BN: Array, width: float, damping_B: Array, low_B3: Array, high_B3: Array
) -> Array:
    """The step that the residuals' weighted least squares ask for; none along a bound that is pressed against."""
    log_loss_BN = _log_loss(theta_B3, x_N)
    residuals_BN = targets_BN - log_loss_BN
    # d log L̂ / d(log A, α, log E): the power's share, −x times it, and the floor's share.
    share_BN = np.exp(theta_B3[:, :1] - theta_B3[:, 1:2] * x_N - log_loss_BN)
    slopes_B3N = np.stack([share_BN, -x_N * share_BN, 1 - share_BN], 1)
    weights_BN = np.minimum(1.0, width / np.maximum(np.abs(residuals_BN), 1e-300))
    gradient_B3 = (slopes_B3N @ (weights_BN * residuals_BN)[:, :, None])[:, :, 0]
    held_B3 = ((theta_B3 <= low_B3) & (gradient_B3 < 0)) | ((theta_B3 >= high_B3) & (gradient_B3 > 0))
    slopes_B3N = np.where(held_B3[:, :, None], 0.0, slopes_B3N)
    curvature_B33 = (slopes_B3N * weights_BN[:, None]) @ slopes_B3N.transpose(0, 2, 1)
    diagonal_B3 = np.einsum("bkk->bk", curvature_B33)
    damped_B33 = curvature_B33 + (damping_B[:, None] * diagonal_B3 + 1e-14)[:, :, None] * np.eye(3)
    return np.linalg.solve(damped_B33, np.where(held_B3, 0.0, gradient_B3)[:, :, None])[:, :, 0]
