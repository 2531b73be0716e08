"""The config of `scripts/ladder.py`: a baseline and candidates, each at a few depths (MAI-Thinking-1 report §2.2)."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Count, Name, Section, Share, Weight, Whole
from mai_thinking.config.loading import merge, validate
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.run import BatchSection
from mai_thinking.errors import UsageError

Rung = Annotated[int, Field(ge=1, le=10_000)]
"""A depth."""
Probe = Literal["latent-norm", "shared-expert", "bias-balance", "micro-batch-balance"]
"""A change of the architecture that is asked about and no part of the recipe: `mai_thinking.experiments.probes`."""


class VariantSection(Section):
    """One of the configs that a ladder compares."""

    name: Name
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of a pre-training config laid over the ladder's `run`: architecture, mixture, optimiser. Lists are replaced
    whole."""
    scale: dict[str, Weight] = Field(default_factory=dict)
    """Laid over the ladder's `scale`."""
    probe: Probe | None = None


class ManyRunsConfig(Section):
    """What a ladder and a search of mixtures have in common: short pre-training runs in one folder, to be compared."""

    name: Name
    output_dir: str = ""
    """The folder, which workers share; empty means `runs/NAME`."""
    run: dict[str, Any]
    """What all runs have in common: keys of a pre-training config."""
    target_tokens: float | None = Field(None, gt=0)
    """Training tokens of the run that these speak for. Their sources are cut by document, so that each is repeated as
    often as it will be there (§2.4.5). Null: every run has all, and repeats the more the longer it is."""

    derived: ClassVar[tuple[str, ...]] = (
        *("name", "seed", "output_dir", "steps", "init_by_name", "data.down_sample", "schedule.warmup_steps"),
    )
    """Keys of a run that are not the user's to set."""

    @property
    def folder(self) -> Path:
        """The folder."""
        return Path(self.output_dir or f"runs/{self.name}").expanduser()

    def derive_run(
        self, name: str, tree: dict[str, Any], more: dict[str, Any], *, seed: int, steps: int, warmup: float
    ) -> PretrainConfig:
        """One run: the user's `tree`, what follows from its place among the runs, and `more`. UsageError for a key that
        is unknown or not the user's to set."""
        where = f"{self.name}, {name}"
        for key in self.derived:
            section, _, last = key.rpartition(".")
            if last in (tree.get(section) or {} if section else tree):
                raise UsageError(f"{where}: {key} is derived; remove it")
        derived: dict[str, Any] = {
            "name": name,
            "seed": seed,
            "output_dir": str(self.folder / "runs" / name),
            "steps": steps,
            "init_by_name": True,
            "schedule": {"warmup_steps": round(warmup * steps)},
        }
        if self.target_tokens is not None:
            tokens = steps * validate(BatchSection, tree.get("batch", {}), f"{where}: batch").tokens_per_step
            derived["data"] = {"down_sample": min(1.0, tokens / self.target_tokens)}
        # Losses are compared at the end of a run; what it says on its way is nobody's.
        quiet = {"evaluation": {"every": steps, "sample_prompts": []}}
        return validate(PretrainConfig, merge(merge(merge(quiet, tree), derived), more), where)


class LadderConfig(ManyRunsConfig):
    """A ladder: every variant at every depth with every seed, each run as long as its active parameters ask for."""

    derived = (*ManyRunsConfig.derived, "model.ladder", "model.num_hidden_layers")
    scale: dict[str, Weight] = Field(default_factory=dict)
    """Fields of the model that grow with the depth L: each is its number times L, which has to be whole. Empty: the
    report's rule, where L sets every size (`ladder: L`)."""
    rungs: tuple[Rung, ...] = Field(min_length=1)
    """Depths. The baseline's law needs three."""
    seeds: tuple[Whole, ...] | dict[Rung, Count] = Field((0, 1), min_length=1)
    """The same for all rungs, or how many each rung has. All variants have the same, so that their runs are pairs."""
    difference: float = Field(0.03, gt=0, lt=1)
    """The efficiency gain that is worth having: a candidate of which so much can be excluded is rejected."""
    tokens_per_active_parameter: Weight
    """The report has 100 to 200."""
    warmup: Share = 0.05
    """Share of the steps."""
    baseline: VariantSection
    candidates: tuple[VariantSection, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.seeds, dict) and set(self.seeds) != set(self.rungs):
            raise ValueError(f"seeds: name each of the rungs {list(self.rungs)}, and no others")
        names = [variant.name for variant in self.variants]
        for what, values in (("rungs", self.rungs), ("seeds", tuple(self.seeds)), ("candidates", names)):
            if len(set(values)) < len(values):
                raise ValueError(f"{what}: {list(values)} has one twice; give each once")
        for variant in self.variants:
            self.run_config(variant, self.rungs[0], seed=0, steps=1)
        return self

    @property
    def variants(self) -> tuple[VariantSection, ...]:
        """The baseline and the candidates."""
        return self.baseline, *self.candidates

    def seeds_of(self, rung: int) -> tuple[int, ...]:
        """The seeds of one rung."""
        return tuple(range(self.seeds[rung])) if isinstance(self.seeds, dict) else self.seeds

    def run_config(self, variant: VariantSection, rung: int, seed: int, steps: int) -> PretrainConfig:
        """The config of one run of `steps` steps; `UsageError` for a key that is unknown or not the user's to set."""
        sizes = {name: _whole(name, factor, rung) for name, factor in (self.scale | variant.scale).items()}
        return self.derive_run(
            f"{variant.name}-L{rung}-s{seed}",
            merge(self.run, variant.overrides),
            {"model": sizes | {"num_hidden_layers": rung} if sizes else {"ladder": rung}},
            seed=seed,
            steps=steps,
            warmup=self.warmup,
        )


def _whole(name: str, factor: float, rung: int) -> int:
    size = round(factor * rung)
    if abs(size - factor * rung) > 1e-6 or size < 1:
        raise UsageError(f"scale.{name}: {factor} × {rung} layers is not a whole number; change it or the rungs")
    return size
