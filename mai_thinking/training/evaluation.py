"""Held-out likelihood: bits per byte by category, the report's weighted score, and compressors as a yardstick.

MAI-Thinking-1 report §2.3: NLL per category, weighted; bits per byte where tokenizers differ; at a run's end Eq. 3 over
several sets a category. §2.6: what is known by heart.
"""

import functools
import gzip
import lzma
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
import xxhash
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.storage import atomic_file
from mai_thinking.config.table import Cell, Table
from mai_thinking.data import PreparedData
from mai_thinking.data.documents import Document
from mai_thinking.data.held_out import fingerprint, held_out_sets
from mai_thinking.data.jsonl import read_text, shown
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.model.loss import CHUNK_ELEMENTS
from mai_thinking.model.projection import fp32_product
from mai_thinking.training.context import RunContext
from mai_thinking.training.learner import Learner
from mai_thinking.training.ledger import EVALUATION
from mai_thinking.training.metrics import MetricsLog, read_records

CATEGORY_WEIGHTS = {"code": 0.5, "stem": 0.175, "maths": 0.175, "general": 0.1, "multilingual": 0.05}
"""The report's weights. Categories without held-out text are left out and the rest scaled to sum to 1."""
MEMORISED = 0.01
"""Nats: the report's bound of a token that is known by heart (§2.6)."""

SHARE, SMALLEST = 0.04, 4096
BYTES_PER_TRAINED_TOKEN = 5
"""Held-out bytes that take no longer than one trained token: a forward pass is less than a third of a step, windows
that overlap read a token twice, and a token has three bytes at least."""


class Likelihood(NamedTuple):
    """How well text was predicted: Σ −log p over the predicted tokens, their number, the bytes of the same text in
    UTF-8, and the tokens of less than `MEMORISED` nats, where they were counted."""

    nats: float
    tokens: int
    bytes: int
    sure: int = 0

    @property
    def nll(self) -> float:
        """Nats per token."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers, and with a compressor's ratio."""
        return self.nats / math.log(2) / max(1, self.bytes)


Window = tuple[list[int], list[int]]
"""Input tokens, and for each the next one or -100 where another window predicts it."""
Together = Callable[[Iterable[list[Window]], list[Window]], Iterable[list[Window]]]
"""Batches of windows, and one that says nothing, for a rank whose own are done before the others'."""


def evaluate_texts(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    context_length: int,
    batch_size: int,
    **more: Any,
) -> Likelihood:
    """Likelihood of whole documents, each after an end-of-text token and followed by one.

    Windows of `context_length` overlap by half: every token is predicted once, and but for a document's beginning with
    at least half a context before it. The end of a document is predicted too, as in training. `more` as
    `evaluate_windows` takes it.
    """
    windows = _windows(texts, Encoder(tokenizer), context_length)
    found = evaluate_windows(model, windows, batch_size=batch_size, **more)
    return found._replace(bytes=sum(len(text.encode()) for text in texts))


@torch.no_grad()
def evaluate_windows(
    model: MaiThinkingForCausalLM,
    windows: Iterable[Window],
    *,
    batch_size: int,
    heartbeat: Callable[[], None] = lambda: None,
    count_sure: bool = False,
    together: Together = lambda batches, _: batches,
) -> Likelihood:
    """Likelihood of the windows' targets. `heartbeat` is called after each batch. `count_sure` fills `Likelihood.sure`.
    `together` is for ranks that call the model together (`Learner.together`). Leaves the model in the mode it was in
    and touches no random generator."""
    pad = functools.partial(pad_sequence, batch_first=True)
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64)
    tokens = sure = 0
    try:
        for batch in together(_batched(windows, batch_size), [([0], [-100])]):
            # With any token, on the right: attention is causal, so what stands there does not reach another.
            inputs = pad([torch.tensor(part) for part, _ in batch])
            targets = pad([torch.tensor(part) for _, part in batch], padding_value=-100).to(model.device)
            head = functools.partial(_score_targets, targets, count_sure)
            scores = model(input_ids=inputs.to(model.device), use_cache=False, head=head).scores.double().cpu()
            nats += scores[0]
            tokens += int((targets != -100).sum())
            sure += int(scores[1])
            heartbeat()
    finally:
        model.train(was_training)
    return Likelihood(float(nats), tokens, 0, sure)


def _score_targets(
    targets_BT: Tensor, count_sure: bool, hidden_BTD: Tensor, weight_VD: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """[2]: −log p summed over the targets that are not -100, and how many are sure; a chunk of logits at a time."""
    scored = targets_BT != -100
    operand_VD = weight_VD.to(dtype or weight_VD.dtype)
    hidden_ND, targets_N = hidden_BTD[scored].to(operand_VD.dtype), targets_BT[scored]
    size = max(1, CHUNK_ELEMENTS["cuda"] // weight_VD.size(0))
    nats = torch.zeros((), device=hidden_ND.device)
    sure = torch.zeros_like(nats)
    for hidden, targets in zip(hidden_ND.split(size), targets_N.split(size), strict=True):
        logits = fp32_product(hidden, operand_VD.mT)
        nats = nats + F.cross_entropy(logits, targets, reduction="sum")
        if count_sure:
            sure = sure + (F.cross_entropy(logits, targets, reduction="none") < MEMORISED).sum()
    return torch.stack((nats, sure))


def _windows(texts: Iterable[str], encoder: Encoder, context: int) -> Iterator[Window]:
    for text in texts:
        tokens = [*encoder.encode_prompt(text), encoder.end_of_text]
        done, last = 0, len(tokens) - 1
        while done < last:
            stop = min(last, done + (context if done == 0 else max(1, context // 2)))
            start = max(0, stop - context)
            yield tokens[start:stop], [-100] * (done - start) + tokens[done + 1 : stop + 1]
            done = stop


def _batched(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    # Windows of one length stay together: most are full, and the short rest is padded among its like.
    remaining = iter(windows)
    while window_list := list(islice(remaining, 16 * size)):
        window_list.sort(key=lambda window: -len(window[0]))
        for begin in range(0, len(window_list), size):
            yield window_list[begin : begin + size]


def weighted_score(values: Mapping[str, float]) -> float:
    """The report's weighted mean over the categories that are present."""
    weights = {category: CATEGORY_WEIGHTS[category] for category in values}
    return sum(weights[category] * value for category, value in values.items()) / sum(weights.values())


def summarize(likelihoods: Mapping[str, Likelihood]) -> dict[str, float]:
    """Flat metrics: `bits_per_byte/CATEGORY`, `nll/CATEGORY`, and the weighted score of each."""
    metrics: dict[str, float] = {}
    for name in ("bits_per_byte", "nll"):
        values = {category: getattr(result, name) for category, result in likelihoods.items()}
        metrics |= _by_category(name, values)
    return metrics


def _by_category(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{category}": value for category, value in values.items()} | {name: weighted_score(values)}


class HeldOutLoss(BaseModel):
    """What a fixed model makes of a held-out set: the hash of its text, and nats per byte."""

    text: str
    nats: float


class Reference(BaseModel):
    """The hash of a fixed model's weights, and its loss on held-out sets by their names."""

    model: str
    sets: dict[str, HeldOutLoss]

    @classmethod
    def read(cls, path: Path) -> Self:
        """`UsageError` for a file that is none."""
        try:
            return cls.model_validate_json(read_text(path))
        except ValidationError:
            raise UsageError(f"{shown(path)}: no reference; write one with scripts/evaluate.py --reference") from None

    def write(self, path: Path) -> None:
        """As `read` reads it."""
        with atomic_file(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def normalised(self, results: Mapping[str, Mapping[str, Likelihood]], texts: Mapping[str, str]) -> dict[str, float]:
        """Eq. 3 of §2.3: `normalised/CATEGORY`, the mean over the category's sets of NLL by that of the reference on
        the same bytes, and the weighted `normalised`. `results` is category → set → likelihood, `texts` set → hash.
        `UsageError` for a set of which the reference knows nothing, or other text."""
        found: dict[str, float] = {}
        for category, sets in results.items():
            ratios = []
            for name, result in sets.items():
                known = self.sets.get(name)
                if known is None or known.text != texts[name]:
                    problem = "has other text than the reference has seen" if known else "is not in the reference"
                    raise UsageError(f"evaluation.reference: held-out set {name!r} {problem}; write it anew")
                ratios.append(result.nats / max(1, result.bytes) / known.nats)
            found[category] = sum(ratios) / len(ratios)
        return _by_category("normalised", found)


def compressors(texts: Sequence[str]) -> dict[str, float]:
    """What general-purpose compressors make of the same bytes, all documents in one stream: bits per byte of `gzip -9`
    and `xz -9e`."""
    content = "".join(texts).encode()
    bits = 8 / max(1, len(content))
    return {
        "gzip": len(gzip.compress(content, compresslevel=9, mtime=0)) * bits,
        "xz": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) * bits,
    }


def reference_of(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    *,
    batch_size: int,
    only: Container[str] | None = None,
) -> Reference:
    """What `model` makes of each held-out set of `data`, or of those of the sources named in `only`."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    sets: dict[str, HeldOutLoss] = {}
    context = model.config.max_position_embeddings
    for by_name in held_out_sets(data.held_out, data.config.sources).values():
        for name, found in by_name.items():
            if only is not None and name.split("/")[0] not in only:
                continue
            texts = [document.text for document in found]
            result = evaluate_texts(model, tokenizer, texts, context_length=context, batch_size=batch_size)
            sets[name] = HeldOutLoss(text=fingerprint(found), nats=result.nats / max(1, result.bytes))
    return Reference(model=digest.hexdigest(), sets=sets)


def evaluate_files(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[Path],
    *,
    context_length: int | None,
    batch_size: int,
) -> str:
    """A table with a row per file and one for all of them: bits per byte of the model, of `gzip -9` and of `xz -9e`.
    Raises `UsageError` for a file that is missing, empty or not UTF-8, before anything is computed."""
    texts = {shown(path): read_text(path) for path in paths}
    if empty := [name for name, text in texts.items() if not text]:
        raise UsageError(f"{empty[0]}: is empty")
    sets = {name: [text] for name, text in texts.items()}
    if len(sets) > 1:
        sets["all"] = list(texts.values())
    rows: list[list[Cell]] = []
    for name, those in sets.items():
        context = context_length or model.config.max_position_embeddings
        found = evaluate_texts(model, tokenizer, those, context_length=context, batch_size=batch_size)
        rows.append([name, found.bits_per_byte, *compressors(those).values(), found.bytes])
    return Table(("bits per byte", "model", "gzip -9", "xz -9e", "bytes"), rows, digits=4).markdown()


def affordable(tokens: int, categories: int) -> int:
    """Bytes of each category that an evaluation may read after so many trained `tokens`: those that take at most
    `SHARE` of what these took, but never less than a page or two. By count, not by the clock, so that a run reads the
    same wherever it runs, and however often it is interrupted."""
    return max(SMALLEST, int(SHARE * tokens * BYTES_PER_TRAINED_TOKEN / max(1, categories)))


class HeldOutEvaluation:
    """What `evaluation:` in a pre-training config asks for: resumable, shared by the ranks."""

    def __init__(self, data: PreparedData, config: PretrainConfig, context: RunContext, learner: Learner) -> None:
        """Raises UsageError for a reference that is none."""
        self.data, self.config, self.context, self.learner = data, config, context, learner
        self.section = section = config.evaluation
        self.reference = None
        if section.reference is not None:
            self.reference = Reference.read(Path(section.reference).expanduser())

    def evaluate(self, step: int, *, last: bool) -> dict[str, Any] | None:
        """Each rank its share of the documents: of the first `max_bytes`, or of what is `affordable`; at the end of
        all. That takes long enough to be struck by a fault or asked to stop (None), and goes on with the set where it
        was."""
        between = self.section.every * self.config.batch.tokens_per_step
        most = affordable(between, sum(map(bool, self.data.held_out.values())))
        limit = None if last else min(most, self.section.max_bytes or most)
        known = self._evaluated(step) if last else {}
        by_category = self._sets(by_set=last and self.reference is not None)
        results: dict[str, dict[str, Likelihood]] = {category: {} for category in by_category}
        for category, name, documents in ((c, n, d) for c, sets in by_category.items() for n, d in sets.items()):
            if last and self.context.stop.agreed():
                return None
            texts = _first_bytes([document.text for document in documents], limit)
            results[category][name] = known.get(name) or self._likelihood(texts)
            if last and name not in known and self.context.rank == 0:
                with closing(MetricsLog(self.context.folder.evaluations)) as log:
                    log.append({"step": step, "kind": name, **results[category][name]._asdict()})
        metrics = summarize(
            {category: Likelihood(*map(sum, zip(*sets.values(), strict=True))) for category, sets in results.items()}
        )
        if last and self.reference is not None:
            hashes = {name: fingerprint(found) for sets in by_category.values() for name, found in sets.items()}
            metrics |= self.reference.normalised(results, hashes)
        if last and self.section.memorised_bytes is not None:
            metrics |= self._memorised(self.section.memorised_bytes)
        return metrics

    def _sets(self, *, by_set: bool) -> dict[str, dict[str, list[Document]]]:
        """Category → set → documents; without sets, one that is called as the category."""
        if by_set:
            return held_out_sets(self.data.held_out, self.data.config.sources)
        return {category: {category: found} for category, found in self.data.held_out.items() if found}

    def _memorised(self, limit: int) -> dict[str, float]:
        """`memorised/SOURCE` and `memorised/held_out`: the share of tokens that the model is sure of."""
        texts = {
            name: _first_bytes(
                (self.data.tokenizer.decode(s.tokens[b + 1 : e].tolist()) for b, e in pairwise(s.offsets)), limit
            )
            for name, s in self.data.sources.items()
        }
        held_out = [document.text for documents in self.data.held_out.values() for document in documents]
        texts["held_out"] = _first_bytes(held_out, limit * len(self.data.sources))
        results = {name: self._likelihood(found, count_sure=True) for name, found in texts.items()}
        return {f"memorised/{name}": result.sure / max(1, result.tokens) for name, result in results.items()}

    def _likelihood(self, texts: Sequence[str], *, count_sure: bool = False) -> Likelihood:
        context = self.context
        with context.ledger.span(EVALUATION), context.accelerator.autocast():
            mine = evaluate_texts(
                self.learner.unwrap(),
                self.data.tokenizer,
                texts[context.rank :: context.ranks],
                context_length=self.config.batch.context_length,
                batch_size=self.section.batch_size,
                heartbeat=context.heartbeat,
                count_sure=count_sure,
                together=self.learner.together,
            )
            sums = context.sum(mine._asdict())
        return Likelihood(sums["nats"], *(round(sums[name]) for name in ("tokens", "bytes", "sure")))

    def _evaluated(self, step: int) -> dict[str, Likelihood]:
        """What an earlier attempt at the last evaluation has done of it. All ranks read before one writes."""
        records = [part for part in read_records(self.context.folder.evaluations) if part["step"] == step]
        self.context.accelerator.wait_for_everyone()
        return {part["kind"]: Likelihood(part["nats"], part["tokens"], part["bytes"]) for part in records}


def _first_bytes(texts: Iterable[str], limit: int | None) -> list[str]:
    """Whole texts from the front until `limit` bytes are reached; at least one."""
    taken: list[str] = []
    size = 0
    for text in texts:
        size += len(text.encode())
        if limit is not None and size > limit and taken:
            break
        taken.append(text)
    return taken
