"""A run's evaluations on held-out text: resumable, shared by the ranks.

MAI-Thinking-1 report §2.3: bits per byte by category; at the end Eq. 3 over several sets a category; §2.6: what is
known by heart.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from mai_thinking.config.pretraining import EvaluationSection
from mai_thinking.data import PreparedData
from mai_thinking.data.documents import Document
from mai_thinking.data.held_out import fingerprint, held_out_sets
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.training.context import RunContext
from mai_thinking.training.evaluation import Likelihood, Reference, Together, added, evaluate_texts, summarize
from mai_thinking.training.ledger import EVALUATION
from mai_thinking.training.metrics import MetricsLog, read_records


class HeldOutEvaluation:
    """What `evaluation:` in a pre-training config asks for."""

    def __init__(
        self,
        data: PreparedData,
        section: EvaluationSection,
        context: RunContext,
        *,
        context_length: int,
        together: Together,
    ) -> None:
        """`together` as for `evaluate_texts`. Raises UsageError for a reference that is none."""
        self.data, self.section, self.context, self.context_length = data, section, context, context_length
        self._together = together
        self.reference = None
        if section.reference is not None:
            self.reference = Reference.read(Path(section.reference).expanduser())

    def evaluate(self, model: MaiThinkingForCausalLM, step: int, *, last: bool) -> dict[str, Any] | None:
        """Each rank its share of the documents: of the first `max_bytes`, at the end of all. That takes long enough to
        be struck by a fault or asked to stop (None), and goes on with the set where it was."""
        limit = None if last else self.section.max_bytes
        known = self._evaluated(step) if last else {}
        by_category = self._sets(by_set=last and self.reference is not None)
        results: dict[str, dict[str, Likelihood]] = {category: {} for category in by_category}
        for category, name, documents in ((c, n, d) for c, sets in by_category.items() for n, d in sets.items()):
            if last and self.context.stop.agreed():
                return None
            texts = _first_bytes([document.text for document in documents], limit)
            results[category][name] = known.get(name) or self._likelihood(model, texts)
            if last and name not in known and self.context.rank == 0:
                with closing(MetricsLog(self.context.folder.evaluations)) as log:
                    log.append({"step": step, "kind": name, **asdict(results[category][name])})
        metrics = summarize({category: added(sets.values()) for category, sets in results.items()})
        if last and self.reference is not None:
            hashes = {name: fingerprint(found) for sets in by_category.values() for name, found in sets.items()}
            metrics |= self.reference.normalised(results, hashes)
        if last and self.section.memorised_bytes is not None:
            metrics |= self._memorised(model, self.section.memorised_bytes)
        return metrics

    def _sets(self, *, by_set: bool) -> dict[str, dict[str, list[Document]]]:
        """Category → set → documents; without sets, one that is called as the category."""
        if by_set:
            return held_out_sets(self.data.held_out, self.data.config.sources)
        return {category: {category: found} for category, found in self.data.held_out.items() if found}

    def _memorised(self, model: MaiThinkingForCausalLM, limit: int) -> dict[str, float]:
        """`memorised/SOURCE` and `memorised/held_out`: the share of tokens that the model is sure of."""
        texts = {name: _training_text(self.data, name, limit) for name in self.data.sources}
        held_out = [document.text for documents in self.data.held_out.values() for document in documents]
        texts["held_out"] = _first_bytes(held_out, limit * len(self.data.sources))
        results = {name: self._likelihood(model, found, count_sure=True) for name, found in texts.items()}
        return {f"memorised/{name}": result.sure / max(1, result.tokens) for name, result in results.items()}

    def _likelihood(
        self, model: MaiThinkingForCausalLM, texts: Sequence[str], *, count_sure: bool = False
    ) -> Likelihood:
        context = self.context
        with context.ledger.span(EVALUATION), context.accelerator.autocast():
            mine = evaluate_texts(
                model,
                self.data.tokenizer,
                texts[context.rank :: context.ranks],
                context_length=self.context_length,
                batch_size=self.section.batch_size,
                heartbeat=context.heartbeat,
                count_sure=count_sure,
                together=self._together,
            )
            sums = context.sum(asdict(mine))
        return Likelihood(sums["nats"], *(round(sums[name]) for name in ("tokens", "bytes", "sure")))

    def _evaluated(self, step: int) -> dict[str, Likelihood]:
        """What an earlier attempt at the last evaluation has done of it. All ranks read before one writes."""
        records = [part for part in read_records(self.context.folder.evaluations) if part["step"] == step]
        self.context.accelerator.wait_for_everyone()
        return {part["kind"]: Likelihood(part["nats"], part["tokens"], part["bytes"]) for part in records}


def _training_text(data: PreparedData, name: str, limit: int) -> list[str]:
    """The first documents of a source's training tokens, of at least `limit` bytes if there are so many."""
    source = data.sources[name]
    texts: list[str] = []
    size = 0
    for begin, end in pairwise(source.offsets):
        if size >= limit:
            break
        texts.append(data.tokenizer.decode(source.tokens[begin + 1 : end].tolist()))
        size += len(texts[-1].encode())
    return texts


def _first_bytes(texts: Sequence[str], limit: int | None) -> list[str]:
    """Whole texts from the front until `limit` bytes are reached; at least one."""
    taken: list[str] = []
    size = 0
    for text in texts:
        size += len(text.encode())
        if limit is not None and size > limit and taken:
            break
        taken.append(text)
    return taken
