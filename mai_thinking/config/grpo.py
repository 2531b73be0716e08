"""The config of `scripts/grpo.py`: the RL climb (MAI-Thinking-1 report §3)."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import (
    Coefficient,
    Count,
    EvaluationTemperature,
    Probability,
    Section,
    Temperature,
    Whole,
    fill_from_defaults,
)
from mai_thinking.config.collapse import CollapseSection
from mai_thinking.config.objective import ObjectiveSection
from mai_thinking.config.run import OptimizerSection, ScheduleSection, TrainingConfig
from mai_thinking.config.sampling import CurriculumSection, SamplingSection
from mai_thinking.config.tasks import GradingSection, RewardSection, TaskSection, TemplateSection
from mai_thinking.config.tools import ToolsSection
from mai_thinking.errors import UsageError


class RolloutSection(Section):
    """How rollouts are generated, and how long they may be learned from."""

    slots: Count = 256
    """Sequences that a rank generates at once."""
    temperature: Temperature = 1.0
    top_p: Probability = 0.97
    steps_per_update: Count = 5
    """Gradient steps from one update of the engine's weights to the next."""
    lead: Whole = 0
    """How many updates the engine is ahead of the learner: 0 learns from what the newest weights wrote; with n, as in
    an asynchronous climb, rollouts are n updates old when their turn comes."""
    workers: Whole = 0
    """Processes of each rank that generate while the learner learns; 0: generation, then learning, in one process."""
    max_staleness: Whole = 8
    """A rollout older than so many updates is dropped. Workers begin only what can be learned from in time; with 0 they
    answer what one process would, and the learner waits for them."""
    replay: str | None = None
    """The folder of a run with workers: its batches are made again, by its schedule, in one process, which ends with
    the same weights, bit for bit."""
    replay_nucleus: bool = True
    """The learner's softmax runs over the nucleus that the token was drawn from."""
    replay_experts: bool = True
    """The learner sends a token through the experts that it went through in the engine."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.lead > 0) + (self.workers > 0) + (self.replay is not None) > 1:
            raise ValueError("rollouts: lead, workers and replay each say who generates when; leave one of them")
        if self.lead > self.max_staleness:
            raise ValueError(
                f"rollouts.lead: {self.lead} updates ahead, every rollout would be older than max_staleness "
                f"{self.max_staleness} and dropped; raise that or lower this"
            )
        return self


class PackingSection(Section):
    """How rollouts are laid out for the learner."""

    row_length: int = Field(1024, ge=8, lt=2**31)
    """Places in a row, and so the longest rollout with its prompt."""
    rows: Count = 8
    """Rows that a rank takes through the model at once."""
    long_prompts: Literal["leave_out", "refuse"] = "leave_out"
    """What becomes of a problem whose prompt leaves no room in a row for a response of `curriculum.end` tokens."""


class ClimbEvaluationSection(Section):
    """Held-out problems at intervals: the same ones, with the same random numbers, each time."""

    every: Count = 20
    """Steps from one evaluation to the next; there is one before the first step and one at the end."""
    problems: Count = 64
    """Of each task."""
    samples: Count = 4
    """Responses to each problem: k of pass@k."""
    temperature: EvaluationTemperature | None = None
    """Null: that of the rollouts; 0: greedy."""
    show: Whole = 3
    """Responses printed at each evaluation."""


class GrpoConfig(TrainingConfig):
    """A climb. The defaults are the report's; a small model wants a higher learning rate and smaller groups."""

    init_from: str
    """The model folder to climb from: a base (a pre-training run's `final/`), or a former climb's."""
    allow_third_party: bool = False
    """Start from `init_from` though no record leads from it back to random weights; see `provenance.lineage`."""
    tasks: tuple[TaskSection, ...] = Field(min_length=1)
    template: TemplateSection = TemplateSection()  # type: ignore[call-arg]
    tools: ToolsSection = ToolsSection()
    groups_per_step: Count
    """Problems, each with its whole group of rollouts, in a gradient step over all ranks."""
    rollouts: RolloutSection = RolloutSection()
    sampling: SamplingSection = SamplingSection()
    curriculum: CurriculumSection = CurriculumSection()
    reward: RewardSection = RewardSection()
    grading: GradingSection = GradingSection()
    objective: ObjectiveSection = ObjectiveSection()
    balance: Coefficient = 1e-5
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

    def check_ranks(self, ranks: int) -> None:
        """As `TrainingConfig` says."""
        if self.groups_per_step % ranks:
            raise UsageError(
                f"groups_per_step: {self.groups_per_step} groups cannot be divided over {ranks} ranks; "
                f"make it a multiple of {ranks}, or change --nproc"
            )
