"""The config of `scripts/mixture.py`: a search over mixtures (MAI-Thinking-1 report §2.5.2–2.5.4)."""

from typing import Any, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Count, Whole
from mai_thinking.config.data import DataSection, SourceSection
from mai_thinking.config.loading import merge, validate
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.run import RunConfig

_DERIVED = ("name", "seed", "output_dir", "steps", "init_by_name")


class MixtureConfig(RunConfig):
    """Small models on sampled mixtures, a regression of score on mixture, finals at more compute."""

    run: dict[str, Any]
    """Keys of a pre-training config, all but steps and seed: the model, and the sources with the start's weights."""
    samples: Count = 24
    """Small models: the start, and mixtures sampled around it. A regression needs some 3 for each source."""
    spread: float = Field(1.0, gt=0, le=5)
    """Standard deviation of the log of each source's weight by that of the start."""
    steps: Count
    """Of a small model."""
    final_factor: float = Field(2.8, ge=1, le=100)
    """How many times as much compute a final takes (the report's 2.8)."""
    final_seeds: Count = 3
    """Pairs: the start's, the proposed and the random search's model of one seed begin alike and read alike."""
    target_tokens: float = Field(gt=0)
    """Training tokens of the run that the mixture is for: small models read so much less of each source that each is
    repeated as often as there (§2.4.5)."""
    max_epochs: float = Field(8.0, gt=0)
    """No source is repeated more often in the target run."""
    memorised_bytes: Count = 20_000
    """Of each source, to find the share that a model knows by heart."""
    unseen: tuple[SourceSection, ...] = ()
    """Sources that finals are evaluated on and nothing is trained on: packages that the search has never seen."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in _DERIVED:
            if key in self.run:
                raise ValueError(f"run.{key} is derived by the search; remove it")
        if len(self.start) < 2:
            raise ValueError("run.data.sources: one source is no mixture; name more")
        return self

    @property
    def data(self) -> DataSection:
        """With the start's weights."""
        return validate(DataSection, self.run.get("data", {}), "run.data")

    @property
    def start(self) -> dict[str, float]:
        """Source → share."""
        total = sum(source.weight for source in self.data.sources)
        return {source.name: source.weight / total for source in self.data.sources}

    @property
    def final_steps(self) -> int:
        """Of a final."""
        return round(self.final_factor * self.steps)

    def run_config(
        self, name: str, shares: dict[str, float], *, seed: int, steps: int, **evaluation: Any
    ) -> PretrainConfig:
        """One run on the mixture `shares`; `UsageError` for a key that is unknown."""
        data = self.data
        sources = [s.model_copy(update={"weight": max(1e-6, 100 * shares[s.name])}).model_dump() for s in data.sources]
        batch = validate(PretrainConfig, self.run | {"name": name, "steps": steps}, self.name).batch
        derived = {
            "name": name,
            "seed": seed,
            "output_dir": str(self.folder / "runs" / name),
            "steps": steps,
            "init_by_name": True,
            "data": {
                "sources": sources,
                "tokenizer": {"path": str(self.folder / "tokenizer")},
                "down_sample": min(1.0, steps * batch.tokens_per_step / self.target_tokens),
            },
            "schedule": {"warmup_steps": round(0.05 * steps)},
            "evaluation": {"every": steps, "sample_prompts": [], "memorised_bytes": self.memorised_bytes, **evaluation},
        }
        return validate(PretrainConfig, merge(self.run, derived), self.name)

    def unseen_data(self) -> DataSection:
        """The search's data with the unseen sources, for their held-out text alone."""
        data = self.data.model_copy(update={"sources": (*self.data.sources, *self.unseen)})
        return data.model_copy(
            update={"tokenizer": data.tokenizer.model_copy(update={"path": str(self.folder / "tokenizer")})}
        )


def seeds_of(count: Whole) -> range:
    """The seeds of finals: not the small models'."""
    return range(1, count + 1)
