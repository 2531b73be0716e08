"""What a gradient step of RL minimises, and its rivals."""

import math
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Coefficient, Section


class ObjectiveSection(Section):
    """`objective:` in an RL run's config; `mai_thinking.rl.objective` carries it out. The values are the report's (§3).

    Its rivals: `entropy_control: fixed` or `bonus`; `outer_clip: false`; `dual_clip: 3` with `outer_clip: false`.
    """

    epsilon: float = Field(0.6, ge=0, le=0.999)
    """ε: the trust region of the ratio is [1 − ε, 1/(1 − ε) + k]."""
    outer_clip: bool = True
    """Clip the ratio to [ratio_min, ratio_max] in every branch, also where the trust region leaves it alone."""
    ratio_min: Coefficient = 0.0
    ratio_max: float = Field(50.0, gt=0, le=1e6)
    dual_clip: float | None = Field(None, gt=1, le=1e6)
    """c of dual-clip PPO (Ye et al. 2020): a token with A < 0 costs at most c·|A|; null for none."""

    entropy_control: Literal["adaptive", "fixed", "bonus"] = "adaptive"
    """Move k by the entropy after each step; keep k as it is; keep k and add `entropy_bonus` times the entropy."""
    clip_relaxation: Coefficient = 0.0
    """k₀: the k that a run starts with, and stays with unless the control is adaptive."""
    max_relaxation: Coefficient = 2.5
    """k_max."""
    relaxation_step: float = Field(0.25, gt=0, le=1e6)
    """δ: how far k moves after a step."""
    target_entropy: Coefficient = 0.3
    """H*, in nats per token."""
    entropy_bonus: Coefficient = 0.01
    """Weight of the entropy in the objective, where the control is `bonus`; there only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.clip_relaxation > self.max_relaxation:
            raise ValueError(
                f"objective.clip_relaxation: {self.clip_relaxation} is more than max_relaxation {self.max_relaxation}"
            )
        if self.outer_clip and not self.ratio_min <= 1 <= self.ratio_max:
            raise ValueError(
                f"objective.ratio_max: the outer clip [{self.ratio_min}, {self.ratio_max}] must contain 1, "
                "the ratio of an unchanged policy"
            )
        return self

    @property
    def loss_settings(self) -> dict[str, Any]:
        """What `grpo_loss` has from here: all but k, which moves."""
        return {
            "epsilon": self.epsilon,
            "ratio_min": self.ratio_min if self.outer_clip else 0.0,
            "ratio_max": self.ratio_max if self.outer_clip else math.inf,
            "dual_clip": self.dual_clip,
            "entropy_bonus": self.entropy_bonus if self.entropy_control == "bonus" else 0.0,
        }

    @property
    def step_size(self) -> float:
        """δ; 0 where k stays what it is."""
        return self.relaxation_step if self.entropy_control == "adaptive" else 0.0
