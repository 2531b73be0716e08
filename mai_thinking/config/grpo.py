"""The config of `scripts/grpo.py`: an RL run (MAI-Thinking-1 report §3)."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import (
    ORDERED,
    Coefficient,
    Count,
    EvaluationTemperature,
    Probability,
    Seconds,
    Section,
    Share,
    Temperature,
    Whole,
)
from mai_thinking.config.run import OptimizerSection, ScheduleSection, TrainingConfig
from mai_thinking.config.tasks import GradingSection, RewardSection, TaskSection, TemplateSection
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
    an asynchronous run, rollouts are n updates old when their turn comes."""
    workers: Whole = 0
    """Processes of each rank that generate while the learner learns; 0: generation, then learning, in one process."""
    ray: str | None = None
    """The address of a Ray cluster whose machines run the workers (`auto`: this machine's); None: processes here."""
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
        if self.ray is not None and not self.workers:
            raise ValueError("rollouts.ray: without rollouts.workers nothing runs on the cluster; say how many")
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


class SamplingSection(Section):
    """`sampling:` in an RL run's config: the problem filter, with the report's values (§3.1.5).

    A pass rate is the share of a problem's rollouts that pass. The ends of a range belong to it.
    """

    early_size: Count = 16
    """G_early: rollouts of a problem before it is decided whether it is worth a whole group."""
    early_range: Annotated[tuple[Share, Share], ORDERED] | None = (0.05, 0.8)
    """The pass rates of the early rollouts with which a problem goes on; null asks for the whole group at once."""
    group_size: int = Field(128, ge=2, lt=2**31)
    """G: rollouts in a group."""
    group_size_means: Literal["in-all", "more"] = "in-all"
    """Whether the early rollouts are among the G (§3.1.5) or come before G more (§3.6.2). They are learned from in
    either case, so that `more` gives groups of early_size + group_size."""
    final_range: Annotated[tuple[Share, Share], ORDERED] | None = (0.1, 0.8)
    """The pass rates with which a whole group is learned from; null keeps every group."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("early_range", "final_range"):
            bounds = getattr(self, name)
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

    @property
    def stages(self) -> list[tuple[int, tuple[float, float], str]]:
        """The early rollouts, if they are to decide anything, and the whole group: the rollouts that a group then has,
        the pass rates with which it goes on, and what comes before `too_hard` or `too_easy` where it does not."""
        early = [(self.early_size, self.early_range, "early_")] if self.early_range else []
        return [*early, (self.full_size, self.final_range or (0.0, 1.0), "")]


class CurriculumSection(Section):
    """`curriculum:` in an RL run's config: the longest response, doubled from stage to stage (8k → 128k in §3).

    The report does not say when it moved on. Our rule: when responses begin to need the room, or after a number of
    steps. A response that is cut off earns nothing, so a policy that meets its limit learns to be brief and never shows
    that it wants more. The first limit therefore lies far above what early thoughts need, and the next one comes before
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


BuiltinTool = Literal["calculator", "lookup", "python"]


class ToolsSection(Section):
    """`tools:` of an RL run; without any, a response is one stretch of text."""

    use: tuple[BuiltinTool, ...] = ()
    """Of `mai_thinking.rl.tools.builtin`."""
    servers: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Servers of the Model Context Protocol: a name, and the command that starts it. Each of its tools is one."""
    most_steps: Count = 8
    """A rollout that calls once more ends there."""
    parallel: Count = 4
    """Calls that one step may hold; further ones are not made."""
    tokens: int = Field(default=64, ge=4, lt=2**20)
    """Of what comes of one step; the rest is cut off."""
    seconds: Seconds = 2.0
    """Of processor time for one call of `python`; waiting, ten times as long, as any other tool may take."""
    megabytes: int = Field(default=256, ge=32, lt=2**31)
    """Memory of one call of `python`."""

    @property
    def enabled(self) -> bool:
        """Whether there is any."""
        return bool(self.use or self.servers)


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


class CollapseSection(Section):
    """`collapse:` in an RL run's config; `mai_thinking.rl.collapse` carries it out.

    Every sign is held against the run's own history, so that the defaults fit runs of any size.
    """

    enabled: bool = True
    """Stop a collapsed run with exit code 3. Off, the run goes on whatever its numbers say."""
    window: int = Field(50, ge=10)
    """Readings of a sign that make up its history: their median is what is usual."""
    warmup: int = Field(5, ge=3)
    """Readings of a sign before it is judged."""
    threshold: float = Field(6.0, gt=0)
    """Score of harm, raised by the signs in its company, that is a collapse. Lower is earlier, and oftener wrong."""


class GrpoConfig(TrainingConfig):
    """An RL run. The defaults are the report's; a small model wants a higher learning rate and smaller groups."""

    init_from: str
    """The model folder to start from: a base (a pre-training run's `final/`), or a former RL run's."""
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

    def check_ranks(self, ranks: int) -> None:
        """As `TrainingConfig` says."""
        if self.groups_per_step % ranks:
            raise UsageError(
                f"groups_per_step: {self.groups_per_step} groups cannot be divided over {ranks} ranks; "
                f"make it a multiple of {ranks}, or change --nproc"
            )
