"""Sections that every training run shares: who it is, how it steps, where it runs, what it shows."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Coefficient, ContextLength, Count, Name, Seconds, Section, Share, Whole
from mai_thinking.errors import UsageError

Beta = Annotated[float, Field(ge=0, lt=1)]


class RunConfig(Section):
    """The root of every run's config."""

    name: Name
    """Names the run, and its folder unless `output_dir` says otherwise."""
    seed: Whole = 0
    """Everything random in a run follows from this and the config: weights, data order, dropout."""
    output_dir: str = ""
    """The run's folder; empty means `runs/NAME`."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir or f"runs/{self.name}").expanduser()


class OptimizerSection(Section):
    """AdamW with the report's parameter groups (§2.6); the values are the report's for pre-training."""

    name: Literal["adamw", "muon"] = "adamw"
    """Muon, which is not the report's, takes the matrices between embeddings and head; all else is AdamW's still. For
    one process or `parallel: ddp`."""
    learning_rate: float = Field(2e-4, gt=0, le=100)
    """At the top of the schedule."""
    betas: tuple[Beta, Beta] = (0.95, 0.925)
    epsilon: float = Field(1e-8, ge=1e-30, le=1)
    weight_decay: Coefficient = 0.1
    weight_decay_attention: Coefficient = 0.01
    weight_decay_embeddings: Coefficient = 0.005
    clip_norm: float = Field(1.0, ge=1e-6, le=1e6)
    """Gradients are scaled down to this global L2 norm."""


class ScheduleSection(Section):
    """The learning rate over a run: a linear warm-up, then a cosine from the top to the floor, or constant."""

    shape: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Whole = 0
    floor: Share = 0.1
    """The cosine's end as a share of its top. The report kept 0.1 because RL went better from there."""


class BatchSection(Section):
    """How many tokens a step learns from, and in what pieces."""

    context_length: ContextLength
    """Tokens in a row."""
    global_batch_size: Count
    """Rows in a step, over all ranks and micro-batches."""
    micro_batch_size: Count
    """Rows that a rank takes through the model at once; what is left of its share of the global batch is accumulated.
    A smaller share goes at once."""

    @model_validator(mode="after")
    def _check_divides(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch.global_batch_size: {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        return self

    def check_ranks(self, ranks: int) -> None:
        """Raise UsageError if the rows cannot be divided over so many ranks."""
        share, rest = divmod(self.global_batch_size, ranks)
        if rest or share % min(share, self.micro_batch_size):
            unit = ranks * (self.micro_batch_size if self.micro_batch_size <= share else 1)
            raise UsageError(
                f"batch.global_batch_size: {self.global_batch_size} rows cannot be divided over {ranks} ranks × "
                f"micro-batches of {self.micro_batch_size}; make it a multiple of {unit}, or change --nproc"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens in a global batch."""
        return self.context_length * self.global_batch_size


class CheckpointSection(Section):
    """`checkpoint:` in a run's config; `mai_thinking.training.checkpoint` carries it out."""

    every: Count = 100
    """Steps from one checkpoint to the next. The best value for a failure rate: `scripts/goodput.py project`."""
    keep: Count = 2
    """The newest so many are kept. At least 2, so that a damaged newest one leaves another to go back to."""
    keep_every: Count | None = None
    """Checkpoints of steps that this divides are kept for ever, besides the newest; null keeps none."""
    asynchronous: bool = True
    """Copy the state in the step and write it beside the following steps; false writes it in the step."""


class ExecutionSection(Section):
    """How the arithmetic is carried out. Nothing here changes what is computed, but for rounding."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast over fp32 weights, or fp32 throughout; auto takes bf16 on a GPU and fp32 on a CPU."""
    attention: str = "windowed_sdpa"
    """An attention function that the transformers library knows; ours skips what lies outside the windows."""
    experts: str = "bucketed_mm"
    """An experts function that the transformers library knows; ours hands over to `grouped_mm` off the CPU."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them. With accumulation this also
    makes the balance loss exact over micro-batches (see `training.learner`)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Every rank holds the whole model, or (FSDP2) its share of weights, gradients and optimiser state."""
    expert_parallel: Count = 1
    """Ranks that divide the experts of every layer among them; tokens travel to the rank that has their expert."""
    compile: bool = False
    """Compile the layers with torch.compile: for a GPU, where it fuses what lies between the products."""


class TrackingSection(Section):
    """Where numbers go besides metrics.jsonl and the terminal."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """From the `trackers` extra."""
    documents: bool = False
    """Write which documents each rank reads at each step below `documents/`: for tracing a spike to its text."""
    print_every: Seconds = 10.0
    """Seconds between progress lines where the output is not a terminal."""


class PlanSection(Section):
    """The machine that `--dry-run` reckons with. A run itself takes the ranks that its launcher gives it."""

    gpus: Count | None = None
    """Null: the ranks that there are."""
    gigabytes: float = Field(80, gt=0)
    """Memory of each, in 10⁹ bytes."""


class TrainingConfig(RunConfig):
    """What the configs of all training loops have; `mai_thinking.training.trainer` reads it."""

    steps: Count
    """Updates of the weights in the whole run."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    execution: ExecutionSection = ExecutionSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_defaults(cls, fields: Any) -> Any:
        """Keys of `optimizer` and `schedule` that are not given are the recipe's, not the section's: whoever sets an RL
        run's learning rate alone keeps that run's other values."""
        if not isinstance(fields, dict):
            return fields
        given = {name: fields[name] for name in ("optimizer", "schedule") if isinstance(fields.get(name), dict)}
        return fields | {name: cls.model_fields[name].default.model_dump() | tree for name, tree in given.items()}

    def check_ranks(self, ranks: int) -> None:
        """Raise UsageError if a step cannot be divided over so many ranks."""


class TextTrainingConfig(TrainingConfig):
    """What pre-training and self-distillation have, whose steps are rows of text."""

    batch: BatchSection
    plan: PlanSection = PlanSection()

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(f"schedule.warmup_steps: {self.schedule.warmup_steps} is more than the {self.steps} steps")
        return self

    def check_ranks(self, ranks: int) -> None:
        """As `TrainingConfig` says."""
        self.batch.check_ranks(ranks)
