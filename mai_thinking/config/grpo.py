"""The config of `scripts/grpo.py`: the RL climb (MAI-Thinking-1 report §3)."""

from typing import Any, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Section, fill_from_defaults
from mai_thinking.config.collapse import CollapseSection
from mai_thinking.config.objective import ObjectiveSection
from mai_thinking.config.run import OptimizerSection, ScheduleSection, TrainingConfig
from mai_thinking.config.sampling import CurriculumSection, SamplingSection
from mai_thinking.config.tasks import GradingSection, RewardSection, TaskSection, TemplateSection


class RolloutSection(Section):
    """How rollouts are generated, and how long they may be learned from."""

    slots: int = Field(256, ge=1)
    """Sequences that a rank generates at once."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.97, gt=0, le=1)
    steps_per_update: int = Field(5, ge=1)
    """Gradient steps from one update of the engine's weights to the next."""
    lead: int = Field(0, ge=0)
    """How many updates the engine is ahead of the learner: 0 learns from what the newest weights wrote; with n, as in
    an asynchronous climb, rollouts are n updates old when their turn comes."""
    max_staleness: int = Field(8, ge=0)
    """A rollout older than so many updates is dropped."""
    replay_nucleus: bool = True
    """The learner's softmax runs over the nucleus that the token was drawn from."""
    replay_experts: bool = True
    """The learner sends a token through the experts that it went through in the engine."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lead > self.max_staleness:
            raise ValueError(
                f"rollouts.lead: {self.lead} updates ahead, every rollout would be older than max_staleness "
                f"{self.max_staleness} and dropped; raise that or lower this"
            )
        return self


class PackingSection(Section):
    """How rollouts are laid out for the learner."""

    row_length: int = Field(1024, ge=8)
    """Places in a row, and so the longest rollout with its prompt."""
    rows: int = Field(8, ge=1)
    """Rows that a rank takes through the model at once."""


class ClimbEvaluationSection(Section):
    """Held-out problems at intervals: the same ones, with the same random numbers, each time."""

    every: int = Field(20, ge=1)
    """Steps from one evaluation to the next; there is one before the first step and one at the end."""
    problems: int = Field(64, ge=1)
    """Of each task."""
    samples: int = Field(4, ge=1)
    """Responses to each problem: k of pass@k."""
    temperature: float | None = Field(None, ge=0)
    """Null: that of the rollouts; 0: greedy."""
    show: int = Field(3, ge=0)
    """Responses printed at each evaluation."""


class GrpoConfig(TrainingConfig):
    """A climb. The defaults are the report's; a small model wants a higher learning rate and smaller groups."""

    init_from: str
    """The model folder to climb from: a base (a pre-training run's `final/`), or a former climb's."""
    allow_third_party: bool = False
    """Start from `init_from` though no record leads from it back to random weights; see `provenance.lineage`."""
    tasks: tuple[TaskSection, ...] = Field(min_length=1)
    template: TemplateSection = TemplateSection()  # type: ignore[call-arg]
    groups_per_step: int = Field(ge=1)
    """Problems, each with its whole group of rollouts, in a gradient step over all ranks."""
    rollouts: RolloutSection = RolloutSection()
    sampling: SamplingSection = SamplingSection()
    curriculum: CurriculumSection = CurriculumSection()
    reward: RewardSection = RewardSection()
    grading: GradingSection = GradingSection()
    objective: ObjectiveSection = ObjectiveSection()
    balance: float = Field(1e-5, ge=0)
    """Weight of the load-balance loss (§3.6)."""
    packing: PackingSection = PackingSection()
    optimizer: OptimizerSection = OptimizerSection(
        learning_rate=1e-6,
        betas=(0.95, 0.95),
        epsilon=1e-15,
        weight_decay=0.0,
        weight_decay_attention=0.0,
        weight_decay_embeddings=0.0,
    )
    schedule: ScheduleSection = ScheduleSection(shape="constant")
    evaluation: ClimbEvaluationSection = ClimbEvaluationSection()
    collapse: CollapseSection = CollapseSection()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_defaults(cls, fields: Any) -> Any:
        return fill_from_defaults(cls, fields, "optimizer", "schedule")
