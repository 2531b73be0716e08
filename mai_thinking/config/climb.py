"""The config of `scripts/climb.py`: stages in a row, from random weights to the consolidated model.

MAI-Thinking-1 report §3.1 (the climb), §3.1.4 (self-distillation), §3.5 (consolidation).
"""

import itertools
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Count, Name, Seconds, Section
from mai_thinking.config.distillation import TraceRangeSection
from mai_thinking.config.names import nearest_name
from mai_thinking.config.run import RunConfig

StageKind = Literal["pretrain", "grpo", "self_distill"]
"""What a stage runs: the script of this name."""

RESERVED = ("report", "claims", "config.yaml", "stages.json")
"""What a climb's folder holds beside its stages'."""


def answer_names(stage: str, attempt: int) -> tuple[str, str]:
    """The two stages that answer the `attempt`-th collapse, from 1, of `stage`: the self-distillation, and the rest."""
    number = "" if attempt == 1 else f"-{attempt}"
    return f"{stage}-reset{number}", f"{stage}-on{number}"


class StageTracesSection(TraceRangeSection):
    """Traces of an earlier RL stage, as `traces:` of a self-distillation has them, with a stage for the run."""

    stage: str


class StageSection(Section):
    """One stage: a run in the folder OUTPUT/NAME, with a config like any other's."""

    name: Name
    run: StageKind
    config: str
    """The YAML file that the stage's config begins with."""
    init_from: str | None = None
    """The earlier stage whose model this one starts from; null leaves it to `config`. Mid-training reads with that
    model's tokenizer."""
    rollback_of: str | None = None
    """Instead: the earlier stage whose collapse is rolled back, to its newest checkpoint before that was detected. The
    rival of `reset`, to be compared with it."""
    traces: tuple[StageTracesSection, ...] = ()
    """Of a self-distillation: what it learns from. Of several specialists it makes one model."""
    set: dict[str, Any] = Field(default_factory=dict)
    """key.path: value, laid over `config` as a script's overrides are."""
    seconds_per_step: Seconds | None = None
    """What a step took, all in all, where it was measured: `--dry-run` reckons with it until the climb has measurements
    of its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.run == "self_distill") != bool(self.traces):
            raise ValueError(f"stage {self.name!r}: `traces` are what a self_distill learns from, and it alone")
        if self.init_from is not None and self.rollback_of is not None:
            raise ValueError(f"stage {self.name!r}: it starts from `init_from` or from `rollback_of`; remove one")
        return self


class ResetSection(Section):
    """The answer to a collapse (§3.1.4): its traces older than the damage are distilled into the weights that the stage
    began with, and the stage goes on from there with the steps that are left."""

    config: str
    """The YAML file of the self-distillation; its traces are the climb's to set."""
    set: dict[str, Any] = Field(default_factory=dict)
    """key.path: value, laid over `config`. With `init_from`, the traces go into that model instead: the mid-trained one
    of the report, where the stage began with a later one."""
    set_on: dict[str, Any] = Field(default_factory=dict)
    """key.path: value, laid over the config of the stage that goes on: what led to the collapse, otherwise."""
    at_most: Count = 1
    """Collapses of one stage that are answered; one more ends the climb."""
    seconds_per_step: Seconds | None = None
    """As in a stage."""


class ClimbConfig(RunConfig):
    """A whole climb. A stage without a `seed` draws its own from the climb's and its name."""

    stages: tuple[StageSection, ...] = Field(min_length=1)
    """In an order in which they can be run: each after what it begins with."""
    reset: ResetSection | None = None
    """Null: a collapse ends the climb."""
    accept_collapse: bool = False
    """Take a collapse for an outcome like any other, where no stage needs the model: as studies do, which compare."""

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        earlier: dict[str, StageKind] = {}
        for stage in self.stages:
            if stage.name in earlier or stage.name in RESERVED:
                why = "is used twice" if stage.name in earlier else "is the climb's own"
                raise ValueError(f"stage {stage.name!r}: the name {why}; take another")
            climbs = [*(traces.stage for traces in stage.traces), *filter(None, [stage.rollback_of])]
            for name in (*filter(None, [stage.init_from]), *climbs):
                if name not in earlier:
                    hint = nearest_name(name, earlier) if earlier else "it is the first"
                    raise ValueError(f"stage {stage.name!r}: there is no earlier stage {name!r}; {hint}")
            for name in climbs:
                if earlier[name] != "grpo":
                    raise ValueError(f"stage {stage.name!r}: {name!r} does not climb; name a grpo stage")
            earlier[stage.name] = stage.run
        if self.reset is not None:
            climbs = [name for name, run in earlier.items() if run == "grpo"]
            for climb, attempt in itertools.product(climbs, range(1, self.reset.at_most + 1)):
                for name in earlier.keys() & answer_names(climb, attempt):
                    raise ValueError(f"stage {name!r}: {climb!r} may need the name; take another")
        return self
