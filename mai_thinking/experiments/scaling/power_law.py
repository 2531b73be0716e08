"""The law of a ladder, L = A·C^−α + E: fits by the thousand at once (MAI-Thinking-1 report §2.2).

A fit minimises the Huber loss of log L − log L̂, as Hoffmann et al. (2022, §3.3) do. For a given α the law is a line in
C^−α, so that A and E follow by weighted least squares; α is looked for in a grid around the best so far, which narrows.
A bootstrap refits thousands of data sets that differ in nothing but noise, so all of them are fitted together.

Shape suffixes: N points, B data sets, G exponents.
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
_ROUNDS, _NARROWER = 24, 0.6
_GRID = np.arange(-4, 5)
"""Exponents that are tried in a round, in steps of their logarithm."""


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
    """The law through the points; the caller knows whether they can support one."""
    reference = float(np.exp(np.mean(np.log(costs_N))))
    # First with the residuals' scale unknown (nearly least absolute deviations), then with it.
    rough = _search(costs_N, losses_N[None], reference, 1e-3)[0]
    residuals_N = np.log(losses_N) - np.log(rough.loss(costs_N))
    scale = 1.4826 * float(np.median(np.abs(residuals_N)))
    return _search(costs_N, losses_N[None], reference, _HUBER * max(scale, _LEAST_SCALE))[0]


def refit(law: PowerLaw, costs_N: Array, losses_BN: Array, scale: float) -> PowerLaw:
    """One law for each row of `losses_BN`, about the reference of `law`; `scale` is the noise's standard deviation in
    log L."""
    return _search(costs_N, losses_BN, law.reference, _HUBER * max(scale, _LEAST_SCALE))


def _search(costs_N: Array, losses_BN: Array, reference: float, width: float) -> PowerLaw:
    """The laws of least Huber loss within the bounds. In a round A and E take a Gauss-Newton step for each exponent,
    with weights and slopes of the best law of the round before."""
    x_N, logs_BN = np.log(costs_N / reference), np.log(losses_BN)
    least_B1, most_B1 = (share * losses_BN.min(axis=1, keepdims=True) for share in _FLOOR_BOUNDS)
    low, high = np.log(ALPHA_BOUNDS)
    step, middle_B1 = (high - low) / (len(_GRID) - 1), np.full((len(losses_BN), 1), (low + high) / 2)
    fitted_BN, rows = losses_BN, np.arange(len(losses_BN))
    for _ in range(_ROUNDS):
        alphas_BG = np.exp(np.clip(middle_B1 + step * _GRID, low, high))
        residuals_BN = logs_BN - np.log(fitted_BN)
        targets_BN = fitted_BN * (1 + residuals_BN)
        weights_BN = np.minimum(1.0, width / np.maximum(np.abs(residuals_BN), 1e-300)) / fitted_BN**2
        weights_BN /= weights_BN.sum(axis=1, keepdims=True)
        powers_BGN = np.exp(-alphas_BG[:, :, None] * x_N)
        mean_BG = np.einsum("bgn,bn->bg", powers_BGN, weights_BN)
        mean_target_B1 = (weights_BN * targets_BN).sum(axis=1, keepdims=True)
        centred_BGN = powers_BGN - mean_BG[:, :, None]
        factors_BG = np.einsum("bgn,bn->bg", centred_BGN, weights_BN * targets_BN)
        factors_BG /= np.einsum("bgn,bgn,bn->bg", centred_BGN, centred_BGN, weights_BN)
        floors_BG = np.clip(mean_target_B1 - factors_BG * mean_BG, least_B1, most_B1)
        # Once more for those whose floor was out of bounds.
        factors_BG = np.einsum("bgn,bn->bg", powers_BGN, weights_BN * targets_BN) - floors_BG * mean_BG
        factors_BG /= np.einsum("bgn,bgn,bn->bg", powers_BGN, powers_BGN, weights_BN)
        factors_BG = np.maximum(factors_BG, 1e-30 * least_B1)
        fitted_BGN = factors_BG[:, :, None] * powers_BGN + floors_BG[:, :, None]
        best_B = _huber(logs_BN[:, None] - np.log(fitted_BGN), width).argmin(axis=1)
        fitted_BN, middle_B1 = fitted_BGN[rows, best_B], np.log(alphas_BG[rows, best_B])[:, None]
        step *= _NARROWER
    return PowerLaw(np.log(factors_BG[rows, best_B]), alphas_BG[rows, best_B], floors_BG[rows, best_B], reference)


def _huber(residuals: Array, width: float) -> Array:
    """Summed over the points."""
    size = np.abs(residuals)
    return np.asarray(np.where(size <= width, 0.5 * size**2, width * (size - 0.5 * width)).sum(-1))
