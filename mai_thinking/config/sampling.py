"""Which problems RL learns from, and how long a response may be."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Count, Section, Share, Whole


class SamplingSection(Section):
    """`sampling:` in an RL run's config, for `mai_thinking.rl.problem_filter`. The values are the report's (§3.1.5).

    A pass rate is the share of a problem's rollouts that pass. The ends of a range belong to it.
    """

    early_size: Count = 16
    """G_early: rollouts of a problem before it is decided whether it is worth a whole group."""
    early_range: tuple[Share, Share] | None = (0.05, 0.8)
    """The pass rates of the early rollouts with which a problem goes on; null asks for the whole group at once."""
    group_size: int = Field(128, ge=2, lt=2**31)
    """G: rollouts in a group."""
    group_size_means: Literal["in-all", "more"] = "in-all"
    """Whether the early rollouts are among the G (§3.1.5) or come before G more (§3.6.2). They are learned from in
    either case, so that `more` gives groups of early_size + group_size."""
    final_range: tuple[Share, Share] | None = (0.1, 0.8)
    """The pass rates with which a whole group is learned from; null keeps every group."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("early_range", "final_range"):
            bounds = getattr(self, name)
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"sampling.{name}: {bounds[0]} is more than {bounds[1]}; put the lower end first")
            size = self.early_size if name == "early_range" else self.full_size
            if bounds is not None and math.floor(bounds[1] * size + 1e-9) < math.ceil(bounds[0] * size - 1e-9):
                raise ValueError(f"sampling.{name}: no pass rate of {size} rollouts lies in {list(bounds)}; widen it")
        early = self.early_range is not None and self.group_size_means == "in-all"
        if early and self.early_size > self.group_size:
            raise ValueError(
                f"sampling.early_size: {self.early_size} is more than the {self.group_size} rollouts of a group in all"
            )
        return self

    @property
    def full_size(self) -> int:
        """Rollouts in a whole group, the early ones included."""
        return self.group_size + (self.early_size if self.group_size_means == "more" else 0)


class CurriculumSection(Section):
    """`curriculum:` in an RL run's config: the longest response, doubled from stage to stage (8k → 128k in §3).

    The report does not say when it moved on. Our rule: when responses begin to need the room, or after a number of
    steps.
    A response that is cut off earns nothing, so a policy that meets its limit learns to be brief, and would never
    show that
    it wants more. The first limit therefore lies far above what early thoughts need, and the next one comes before
    this one is met.
    """

    start: Count = 8192
    """Tokens of the longest response in the first stage."""
    end: Count = 131072
    """The same in the last stage: `start` doubled as often as there are more stages. Equal to `start`: one stage."""
    long_share: float | None = Field(0.1, ge=0, lt=1)
    """Move on when more than this share of the responses of the last `window` steps took more than half of the limit,
    of all that were generated, also for problems that are then dropped; null for never."""
    window: Count = 20
    """Steps, all of the present stage, over which that share is taken."""
    min_steps: Whole = 0
    """Steps that a stage lasts at least: a base that does not yet end its responses is not in want of room."""
    max_steps: Count | None = None
    """Steps after which a stage ends in any case; null for no limit."""
    penalty_in_last_stage: bool = False
    """Charge for length in the last stage too. The report stops there; a run of one stage has only that one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.end != self.start << self.stages - 1:
            raise ValueError(f"curriculum.end: {self.end} is not start {self.start} doubled some number of times")
        if self.stages > 1 and self.long_share is None and self.max_steps is None:
            raise ValueError("curriculum.max_steps: there is no rule for moving on; set this or long_share")
        if self.max_steps is not None and self.max_steps < self.min_steps:
            raise ValueError(f"curriculum.max_steps: {self.max_steps} is less than min_steps {self.min_steps}")
        return self

    @property
    def stages(self) -> int:
        """How many lengths there are."""
        return max(1, (self.end // self.start).bit_length())
