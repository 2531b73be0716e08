"""The config of `scripts/mixture.py`: a search over mixtures (MAI-Thinking-1 report §2.5.2–2.5.4)."""

from collections.abc import Iterable
from typing import Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Count, Whole
from mai_thinking.config.data import DataSection, SourceSection
from mai_thinking.config.ladder import ManyRunsConfig
from mai_thinking.config.loading import validate
from mai_thinking.config.pretraining import PretrainConfig


class MixtureConfig(ManyRunsConfig):
    """Small models on sampled mixtures, a regression of score on mixture, finals at more compute. The sources in `run`
    have the start's weights."""

    seed: Whole = 0
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
    """Training tokens of the run that the mixture is for."""
    max_epochs: float = Field(8.0, gt=0)
    """No source is repeated more often in the target run."""
    memorised_bytes: Count = 20_000
    """Of each source, to find the share that a model knows by heart."""
    unseen: tuple[SourceSection, ...] = ()
    """Sources that finals are evaluated on and nothing is trained on: packages that the search has never seen."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.start) < 2:
            raise ValueError("run.data.sources: one source is no mixture; name more")
        self.run_config("start", self.start.values(), seed=0, steps=self.steps, reference=None)
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
        self, name: str, shares: Iterable[float], *, seed: int, steps: int, reference: str | None
    ) -> PretrainConfig:
        """One run on a mixture, each source's share; `UsageError` for a key that is unknown."""
        weights = [max(1e-6, 100 * float(share)) for share in shares]
        more = {
            "data": {
                "sources": [
                    source.model_dump() | {"weight": weight}
                    for source, weight in zip(self.data.sources, weights, strict=True)
                ],
                "tokenizer": {"path": str(self.folder / "tokenizer")},
            },
            "evaluation": {"memorised_bytes": self.memorised_bytes, "reference": reference},
        }
        return self.derive_run(name, self.run, more, seed=seed, steps=steps, warmup=0.05)

    def unseen_data(self) -> DataSection:
        """The search's data with the unseen sources, for their held-out text alone."""
        data = self.data.model_copy(update={"sources": (*self.data.sources, *self.unseen)})
        return data.model_copy(
            update={"tokenizer": data.tokenizer.model_copy(update={"path": str(self.folder / "tokenizer")})}
        )
