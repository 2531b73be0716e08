"""The config of `scripts/self_distill.py`: SFT on traces of our own (MAI-Thinking-1 report §3.1.4, §3.5)."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mai_thinking.config.base import (
    ORDERED,
    Coefficient,
    Count,
    Dropout,
    Pattern,
    Section,
    Share,
    Weight,
    Whole,
)
from mai_thinking.config.data import DataSection
from mai_thinking.config.run import OptimizerSection, ScheduleSection, TextTrainingConfig
from mai_thinking.config.tasks import TemplateSection

Hack = Literal["several-answers", "own-question"]
"""Reward hacks that `mai_thinking.rl.trace_selection` knows by the frame that a run asked in."""

LATE = 0.25
"""Traces of a run's last quarter: several late checkpoints, which beat the last one alone; early ones hurt (§3.1.4)."""
WARMUP = 0.02
"""Share of the steps (§3.1.4)."""


class TraceRangeSection(Section):
    """Which traces of an RL run are learned from, and how much they count."""

    weight: Weight = 1.0
    """Share of the traces chosen and of those learned from, relative to the other sources' weights (§3.5: 56/11/33)."""
    steps: Annotated[tuple[Whole, Whole], ORDERED] | None = None
    """First and last gradient step that the weights behind a trace may have had; null means any. A climb that collapsed
    is answered from traces older than the damage."""
    late: float | None = Field(None, gt=0, le=1)
    """Of the checkpoints in `steps`, the latest share; a small number means the last one alone. Null: a quarter, or all
    where `steps` are given."""


class TraceSourceSection(TraceRangeSection):
    """One RL run whose traces are learned from."""

    run: str = Field(min_length=1)
    """The run's folder; the traces lie in `traces/` below it."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run).expanduser()

    @property
    def late_share(self) -> float:
        """`late`, or its default."""
        return self.late or (LATE if self.steps is None else 1.0)


class SelectionSection(Section):
    """Which traces are learned from. A rule that is null is off; each says how many traces it removed."""

    correct_only: bool = True
    """Only traces with a positive task reward. Mixed ones do alike (§3.1.4); the report took the correct."""
    unfinished: bool = False
    """Keep traces that were cut off at the length limit."""
    unanswered: bool = False
    """Keep traces without an answer in their frame."""
    max_repetition: Share | None = 0.5
    """Most of a response's runs of 8 tokens that may have occurred in it before; more is a loop."""
    max_foreign: Share | None = 0.05
    """Most of a thought's words that may be of another language than English (§3.1)."""
    hacks: tuple[Hack, ...] = ("several-answers", "own-question")
    """Known reward hacks to remove. `several-answers`: more than one answer in the frame, of which the last counts.
    `own-question`: the response asks a question in the frame itself, and answers that."""
    patterns: dict[str, Pattern] = Field(default_factory=dict)
    """More hacks: a name, and a regular expression that responses are searched for."""
    per_prompt: Count = 4
    """Most traces of one prompt. More prompts beat more traces per prompt (§3.1.4)."""
    total: Count = 1_000_000
    """Most traces in all, divided over the sources by their weights. Prompts are drawn uniformly, each giving up to
    `per_prompt`, until there are so many; far more than a million narrow the policy (§3.1.4)."""
    order: Literal["random", "shortest"] = "random"
    """Which of a prompt's traces are taken. Random choice beats the shortest (§3.1.4)."""


class ReframeSection(Section):
    """Another chat format on the way: question and answer move from the frame that a trace has into another."""

    template: TemplateSection
    """The new frame."""
    replace: dict[Annotated[str, Field(min_length=1)], str] = Field(default_factory=dict)
    """Strings of what stands before the answer, and what takes their place, such as the end mark of the thought."""


class MixedTextSection(Section):
    """Text between the traces, so that what mid-training taught is kept."""

    share: float = Field(gt=0, lt=1)
    """Of the rows. All tokens of text are learned from, of a trace its response's, so that the share of the loss is
    larger; the run says it."""
    data: DataSection = DataSection()
    """As in mid-training; the tokenizer is that of `init_from`."""

    @field_validator("data")
    @classmethod
    def _check_tokenizer(cls, data: DataSection) -> DataSection:
        if data.tokenizer.path is not None:
            raise ValueError("tokenizer.path: text is encoded as `init_from` reads it; remove the key")
        return data


class DistillConfig(TextTrainingConfig):
    """A self-distillation. The defaults are the report's (§3.1.4); a small model wants a higher learning rate."""

    init_from: str
    """The model folder to train: a base or mid-trained one, or any other of ours."""
    allow_third_party: bool = False
    """Take `init_from` and traces though no record leads from them back to random weights; see
    `mai_thinking.provenance.lineage`."""
    traces: tuple[TraceSourceSection, ...] = Field(min_length=1)
    """One run, or several specialists to be made one (§3.5)."""
    selection: SelectionSection = SelectionSection()
    reframe: ReframeSection | None = None
    """Null: traces keep their frame."""
    text: MixedTextSection | None = None
    """Null: traces alone."""
    dropout: Dropout = 0.15
    """On each sublayer's output, whatever `init_from` was trained with."""
    balance: Coefficient = 1e-2
    """Weight of the load-balance loss."""
    optimizer: OptimizerSection = OptimizerSection(
        learning_rate=1.7e-5, weight_decay=0.001, weight_decay_attention=0.001, weight_decay_embeddings=0.001
    )
    schedule: ScheduleSection = ScheduleSection(floor=5.2 / 17)
    """Of `warmup_steps`, the default is 2 % of the steps."""

    @model_validator(mode="before")
    @classmethod
    def _fill_warmup(cls, fields: Any) -> Any:
        """Before `_fill_from_defaults`: the warm-up goes by `steps`."""
        if not isinstance(fields, dict):
            return fields
        steps, schedule = fields.get("steps"), fields.get("schedule", {})
        if isinstance(steps, int) and isinstance(schedule, dict):
            fields = {**fields, "schedule": {"warmup_steps": math.ceil(WARMUP * max(0, steps)), **schedule}}
        return fields
