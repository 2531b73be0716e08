"""Mixtures: drawn around a start under a cap of epochs, regressed on, proposed. MAI-Thinking-1 report §2.5.2–2.5.4.

Shape suffixes: M mixtures, S sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mai_thinking.errors import UsageError

Array = NDArray[np.float64]
_LITTLE = 0.05
_TRIED = 20_000
_BEST = 50
"""The proposal is the mean of so many mixtures of the best prediction, as RegMix has it: the very best is luck."""


@dataclass(frozen=True)
class MixtureSpace:
    """The mixtures that may be trained on."""

    start_S: Array
    """Shares, which sum to 1."""
    caps_S: Array
    """The largest share of each source: `max_epochs` of its text in the target run."""

    @classmethod
    def of(
        cls, start: Mapping[str, float], unique: Mapping[str, int], target: float, max_epochs: float
    ) -> "MixtureSpace":
        """`unique`: tokens of each source. UsageError where all sources together are too little."""
        caps_S = np.array([max_epochs * unique[name] / target for name in start])
        if caps_S.sum() < 1:
            raise UsageError(
                f"all sources, {max_epochs:g} times over, are {caps_S.sum():.0%} of the target's {target:.3g} tokens; "
                "add sources, or lower target_tokens"
            )
        return cls(_capped(np.array(list(start.values())), caps_S), caps_S)

    def draw(self, count: int, spread: float, rng: np.random.Generator, around_S: Array | None = None) -> Array:
        """[count, S] shares whose logs scatter by `spread`."""
        middle_S = self.start_S if around_S is None else around_S
        drawn_MS = middle_S * np.exp(spread * rng.standard_normal((count, len(middle_S))))
        return np.stack([_capped(row_S / row_S.sum(), self.caps_S) for row_S in drawn_MS])

    def propose(self, model: "Regression", spread: float, rng: np.random.Generator) -> Array:
        """[S] the mixture of the lowest predicted score: global search, then twice around what it found."""
        best_S = self.start_S
        for width in (1.5 * spread, 0.5 * spread, 0.2 * spread):
            tried_MS = np.vstack([best_S, self.draw(_TRIED // 3, width, rng, best_S)])
            chosen_MS = tried_MS[np.argsort(model.predict(tried_MS))[:_BEST]]
            best_S = _capped(chosen_MS.mean(axis=0), self.caps_S)
        return best_S


def _capped(shares_S: Array, caps_S: Array) -> Array:
    """What is above a cap is given to the others, in their proportions."""
    shares_S = shares_S / shares_S.sum()
    for _ in range(len(shares_S)):
        over_S = shares_S >= caps_S
        if not (shares_S > caps_S).any():
            break
        free = 1 - caps_S[over_S].sum()
        rest = shares_S[~over_S].sum()
        shares_S = np.where(over_S, caps_S, shares_S * (free / rest if rest else 0.0))
    return np.asarray(shares_S)


@dataclass(frozen=True)
class Regression:
    """Score by mixture: the mean of a linear and a boosted regression on log(share + 0.05). Trees see bends, but know
    nothing beyond the mixtures that they have seen, and are flat between; the line goes on. A source of a percent or
    less acts as none, since others teach what it would; on plain log shares such mixtures bend the line."""

    models: tuple[Any, ...]
    errors: dict[str, float]
    """Root mean square error on mixtures left out of the fit: `linear`, `boosted`, `both`, and of the mean score
    (`mean`)."""

    @classmethod
    def fit(cls, shares_MS: Array, scores_M: Array, *, seed: int) -> "Regression":
        """With the errors of ten-fold cross-validation. UsageError without scikit-learn."""
        try:
            from sklearn.ensemble import GradientBoostingRegressor
            from sklearn.linear_model import RidgeCV
            from sklearn.model_selection import KFold, cross_val_predict
        except ImportError:
            raise UsageError("a mixture search needs scikit-learn: pip install 'mai_thinking[mixture]'") from None
        linear = RidgeCV(np.geomspace(1e-3, 1e3, 13))
        boosted = GradientBoostingRegressor(n_estimators=200, max_depth=2, learning_rate=0.05, random_state=seed)
        folds = KFold(min(10, len(scores_M)), shuffle=True, random_state=seed)
        features_MS = _features(shares_MS)
        found = {
            name: cross_val_predict(model, features_MS, scores_M, cv=folds)
            for name, model in (("linear", linear), ("boosted", boosted))
        }
        found |= {"both": (found["linear"] + found["boosted"]) / 2, "mean": np.full(len(scores_M), scores_M.mean())}
        errors = {name: float(np.sqrt(((values_M - scores_M) ** 2).mean())) for name, values_M in found.items()}
        return cls(tuple(model.fit(features_MS, scores_M) for model in (linear, boosted)), errors)

    def predict(self, shares_MS: Array) -> Array:
        """[M]"""
        features_MS = _features(shares_MS)
        return np.asarray(np.mean([model.predict(features_MS) for model in self.models], axis=0))


def _features(shares_MS: Array) -> Array:
    """Rounded, so that trees do not split on a source that is there to be scored on alone."""
    return np.asarray(np.log(shares_MS + _LITTLE).round(2))
