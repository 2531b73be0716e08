"""The config of `scripts/pretrain.py`: pre-training and mid-training."""

from typing import Any, Self

from pydantic import Field, model_validator

from mai_thinking.config.base import Count, Section
from mai_thinking.config.data import DataSection
from mai_thinking.config.run import TextTrainingConfig


class EvaluationSection(Section):
    """Held-out bits per byte by category, at intervals and at the end."""

    every: Count = 200
    """Steps from one evaluation to the next."""
    max_bytes: Count | None = 100_000
    """Per category at the intervals, whole documents, and less where that would take more than a twentieth of the
    time; the last evaluation always reads all that is held out."""
    batch_size: Count = 16
    """Windows at once."""
    reference: str | None = None
    """A JSON file with a reference model's losses on the held-out sets, as `scripts/evaluate.py --reference` writes it:
    the last evaluation then has the report's normalised score too (Eq. 3)."""
    memorised_bytes: Count | None = None
    """At the end, find the share of tokens of NLL < 0.01 in so much of each source's training text, and in as much that
    is held out."""
    sample_prompts: tuple[str, ...] = ("def ", "The ", "import ")
    """Continued at the end of the run, so that one sees what was learned; in turn also now and then while it runs."""
    sample_tokens: Count = 80


class PretrainConfig(TextTrainingConfig):
    """A run over text. Mid-training is the same with `init_from`, another context and another mixture (§2.6)."""

    init_from: str | None = None
    """A model folder to start from (a run's `final/`), instead of fresh weights."""
    allow_third_party: bool = False
    """Start from `init_from` though no record leads from it back to random weights; see `provenance.lineage`."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Fields of MaiThinkingConfig, or `ladder: L`, or `preset: mai-base-1`. The vocabulary size is the tokenizer's."""
    init_by_name: bool = False
    """Draw each layer's first weights from the seed and the layer's name, not one after the other, so that models of
    other shapes begin with the same numbers wherever their shapes agree. Ladders do: it makes their pairs alike."""
    data: DataSection = DataSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        """Pre-training takes human and procedural text only (§2.4)."""
        if not any(source.held_out for source in self.data.sources):
            raise ValueError("data.sources: nothing is held out to be evaluated on; remove one's `held_out: false`")
        for source in self.data.sources:
            if source.provenance == "own-model":
                raise ValueError(
                    f"source {source.name!r} was written by a model (own-model); "
                    "pre-training takes human and procedural text only: remove it, or use it in self-distillation"
                )
        return self
