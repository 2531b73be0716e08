"""The config of `scripts/study.py`: arms that differ in one thing, over the same seeds.

What a choice is worth cannot be told from one run of each (MAI-Thinking-1 report §2.5): here each arm is a short row of
climb stages, run once a seed, and the seeds of all arms share what comes before.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Name, Section, Whole
from mai_thinking.config.climb import ClimbConfig, StageSection
from mai_thinking.config.loading import validate
from mai_thinking.config.names import nearest_name
from mai_thinking.config.run import RunConfig


class ArmSection(Section):
    """One way to do it. Without `stage`, that of the study's `stages` as they are."""

    name: Name
    about: str = ""
    """A few words for the table."""
    stage: str | None = None
    """The one of `stages` that is otherwise in this arm."""
    set: dict[str, Any] = Field(default_factory=dict)
    """key.path: value, laid over that stage's config after its own `set`."""
    traces: dict[str, Any] = Field(default_factory=dict)
    """Fields of all of that stage's `traces`."""
    expect: dict[str, Literal["lower", "higher"]] = Field(default_factory=dict)
    """Where a metric of the measured stage lies beside that of the first arm, if what is claimed is so."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.set or self.traces) != (self.stage is not None):
            raise ValueError(f"arm {self.name!r}: `stage` says where `set` and `traces` belong, and these what changes")
        return self


class StudyConfig(RunConfig):
    """Arms × seeds. A stage's name gets its arm before it and its seed behind it: `late-distill-0`."""

    seeds: tuple[Whole, ...] = Field((0, 1, 2), min_length=1)
    shared: tuple[StageSection, ...] = ()
    """Run once a seed; all arms may begin with them."""
    stages: tuple[StageSection, ...] = Field(min_length=1)
    """Run once a seed and arm."""
    arms: tuple[ArmSection, ...] = Field(min_length=2)
    """The first is what the others are held against."""
    measured: str
    """The one of `stages`, a climb, whose first and last evaluation are compared. Where it collapses the last is
    of then, which the page says."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        kinds = {stage.name: stage.run for stage in self.stages}
        for key, name in [("measured", self.measured), *((f"arm {a.name!r}", a.stage) for a in self.arms if a.stage)]:
            if name not in kinds:
                raise ValueError(f"{key}: there is no stage {name!r} among `stages`; {nearest_name(name, kinds)}")
        if kinds[self.measured] != "grpo":
            raise ValueError(f"measured: {self.measured!r} does not climb; name a grpo stage")
        for what, names in (("seeds", self.seeds), ("arms", tuple(arm.name for arm in self.arms))):
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: one is there twice; remove it")
        return self

    def as_climb(self) -> ClimbConfig:
        """All of it as one climb, seed by seed, so that every arm is there for the seeds that are done. UsageError for
        stages that do not fit each other."""
        stages: list[StageSection] = []
        for seed in self.seeds:
            stages += [self._of_seed(stage, seed, "") for stage in self.shared]
            stages += [
                self._of_seed(_changed(stage, arm), seed, arm.name) for arm in self.arms for stage in self.stages
            ]
        own = {"name": self.name, "seed": self.seed, "output_dir": self.output_dir}
        tree = {**own, "stages": stages, "accept_collapse": True}
        return validate(ClimbConfig, tree, f"study {self.name!r}")

    def measured_stage(self, arm: str, seed: int) -> str:
        """Its name in the climb."""
        return self._name(self.measured, seed, arm)

    def _name(self, stage: str, seed: int, arm: str) -> str:
        own = arm and any(stage == other.name for other in self.stages)
        return f"{arm}-{stage}-{seed}" if own else f"{stage}-{seed}"

    def _of_seed(self, stage: StageSection, seed: int, arm: str) -> StageSection:
        tree = stage.model_dump()
        for key in ("name", "init_from", "rollback_of"):
            if tree[key] is not None:
                tree[key] = self._name(tree[key], seed, arm)
        for traces in tree["traces"]:
            traces["stage"] = self._name(traces["stage"], seed, arm)
        tree["set"] = {"seed": seed, **tree["set"]}
        return StageSection.model_validate(tree)


def _changed(stage: StageSection, arm: ArmSection) -> StageSection:
    if arm.stage != stage.name:
        return stage
    tree = stage.model_dump()
    tree["set"] |= arm.set
    tree["traces"] = [traces | arm.traces for traces in tree["traces"]]
    return validate(StageSection, tree, f"arm {arm.name!r}")
