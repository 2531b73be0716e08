"""Held-out likelihood: bits per byte by category, the report's weighted score, and compressors as a yardstick.

MAI-Thinking-1 report §2.3: NLL per category, weighted; bits per byte where tokenizers differ.
"""

import functools
import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mai_thinking.config.storage import atomic_file
from mai_thinking.data import PreparedData
from mai_thinking.data.held_out import fingerprint, held_out_sets
from mai_thinking.data.jsonl import read_text, shown
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.model.loss import CHUNK_ELEMENTS, logits_product

CATEGORY_WEIGHTS = {"code": 0.5, "stem": 0.175, "maths": 0.175, "general": 0.1, "multilingual": 0.05}
"""The report's weights. Categories without held-out text are left out and the rest scaled to sum to 1."""


MEMORISED = 0.01
"""Nats: the report's bound of a token that is known by heart (§2.6)."""


@dataclass(frozen=True)
class Likelihood:
    """How well text was predicted."""

    nats: float
    """Σ −log p over the predicted tokens."""
    tokens: int
    bytes: int
    """Length of the same text in UTF-8."""
    sure: int = 0
    """Tokens of less than `MEMORISED` nats, where they were counted."""

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


@torch.no_grad()
def evaluate_texts(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    context_length: int,
    batch_size: int,
    heartbeat: Callable[[], None] = lambda: None,
    count_sure: bool = False,
    together: Together = lambda batches, _: batches,
) -> Likelihood:
    """Likelihood of whole documents, each after an end-of-text token and followed by one.

    Windows of `context_length` overlap by half: every token is predicted once, and but for a document's beginning with
    at least half a context before it. The end of a document is predicted too, as in training. `heartbeat` is called
    after each batch of windows. `count_sure` fills `Likelihood.sure`. `together` is for ranks that call the model
    together (`Learner.together`). Leaves the model in the mode it was in and touches no random generator.
    """
    encoder = Encoder(tokenizer)
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64)
    tokens = sure = 0
    try:
        for windows in together(_batched(_windows(texts, encoder, context_length), batch_size), [([0], [-100])]):
            inputs, targets = _pad(windows, encoder.end_of_text)
            inputs, targets = inputs.to(model.device), targets.to(model.device)
            head = functools.partial(_score, targets, count_sure)
            scores = model(input_ids=inputs, use_cache=False, head=head).scores.double().cpu()
            nats += scores[0]
            tokens += int((targets != -100).sum())
            sure += int(scores[1])
            heartbeat()
    finally:
        model.train(was_training)
    return Likelihood(float(nats), tokens, sum(len(text.encode()) for text in texts), sure)


def _score(
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
        logits = logits_product(hidden, operand_VD)
        nats = nats + F.cross_entropy(logits, targets, reduction="sum")
        if count_sure:
            sure = sure + (F.cross_entropy(logits, targets, reduction="none") < MEMORISED).sum()
    return torch.stack((nats, sure))


def _windows(texts: Iterable[str], encoder: Encoder, context: int) -> Iterator[Window]:
    for text in texts:
        yield from _cut([*encoder.encode_prompt(text), encoder.end_of_text], context)


def _cut(tokens: list[int], context: int) -> Iterator[Window]:
    inputs, targets = tokens[:-1], tokens[1:]
    done = 0
    while done < len(targets):
        stop = min(len(targets), done + (context if done == 0 else max(1, context // 2)))
        start = max(0, stop - context)
        yield inputs[start:stop], [-100] * (done - start) + targets[done:stop]
        done = stop


def _batched(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    # Windows of one length stay together: most are full, and the short rest is padded among its like.
    remaining = iter(windows)
    while window_list := list(islice(remaining, 16 * size)):
        window_list.sort(key=lambda window: -len(window[0]))
        for begin in range(0, len(window_list), size):
            yield window_list[begin : begin + size]


def _pad(windows: Sequence[Window], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded [B, T]; attention is causal, so what stands to the right of a token does not reach it."""
    longest = max(len(inputs) for inputs, _ in windows)
    inputs = torch.tensor([inputs + [pad] * (longest - len(inputs)) for inputs, _ in windows])
    targets = torch.tensor([targets + [-100] * (longest - len(targets)) for _, targets in windows])
    return inputs, targets


def weighted_score(values: Mapping[str, float]) -> float:
    """The report's weighted mean over the categories that are present."""
    weights = {category: CATEGORY_WEIGHTS[category] for category in values}
    return sum(weights[category] * value for category, value in values.items()) / sum(weights.values())


def summarize(likelihoods: Mapping[str, Likelihood]) -> dict[str, Any]:
    """Flat metrics: `bits_per_byte/CATEGORY`, `nll/CATEGORY`, and the weighted score of each."""
    bits = {category: result.bits_per_byte for category, result in likelihoods.items()}
    nll = {category: result.nll for category, result in likelihoods.items()}
    return {
        **{f"bits_per_byte/{category}": value for category, value in bits.items()},
        **{f"nll/{category}": value for category, value in nll.items()},
        "bits_per_byte": weighted_score(bits),
        "nll": weighted_score(nll),
    }


@dataclass(frozen=True)
class Reference:
    """A fixed model's nats per byte on held-out sets, each with the hash of its text."""

    model: str
    """Hash of its weights."""
    sets: dict[str, tuple[str, float]]

    @classmethod
    def read(cls, path: Path) -> "Reference":
        """`UsageError` for a file that is none."""
        try:
            tree = json.loads(read_text(path))
            return cls(tree["model"], {name: (one["text"], one["nats"]) for name, one in tree["sets"].items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{shown(path)}: no reference; write one with scripts/evaluate.py --reference") from None

    def write(self, path: Path) -> None:
        """As `read` reads it."""
        sets = {name: {"text": text, "nats": nats} for name, (text, nats) in self.sets.items()}
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps({"model": self.model, "sets": sets}, indent=1) + "\n", encoding="utf-8")

    def normalised(self, results: Mapping[str, Mapping[str, Likelihood]], texts: Mapping[str, str]) -> dict[str, float]:
        """Eq. 3 of §2.3: `normalised/CATEGORY`, the mean over the category's sets of NLL by that of the reference on
        the same bytes, and the weighted `normalised`. `results` is category → set → likelihood, `texts` set → hash.

        `UsageError` for a set of which the reference knows nothing, or other text.
        """
        found: dict[str, float] = {}
        for category, sets in results.items():
            ratios = []
            for name, result in sets.items():
                text, nats = self.sets.get(name, ("", 0.0))
                if text != texts[name]:
                    problem = "has other text than the reference has seen" if text else "is not in the reference"
                    raise UsageError(f"evaluation.reference: held-out set {name!r} {problem}; write it anew")
                ratios.append(result.nats / max(1, result.bytes) / nats)
            found[category] = sum(ratios) / len(ratios)
        return {f"normalised/{name}": value for name, value in found.items()} | {"normalised": weighted_score(found)}


def added(parts: Iterable[Likelihood]) -> Likelihood:
    """The likelihood of all texts together."""
    nats, tokens, size, sure = (sum(column) for column in zip(*map(astuple, parts), strict=True))
    return Likelihood(nats, int(tokens), int(size), int(sure))


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
    model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerBase, data: PreparedData, *, batch_size: int
) -> Reference:
    """What `model` makes of each held-out set of `data`."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    sets: dict[str, tuple[str, float]] = {}
    for by_name in held_out_sets(data.held_out, data.config.sources).values():
        for name, found in by_name.items():
            context = model.config.max_position_embeddings
            texts = [document.text for document in found]
            result = evaluate_texts(model, tokenizer, texts, context_length=context, batch_size=batch_size)
            sets[name] = fingerprint(found), result.nats / max(1, result.bytes)
    return Reference(digest.hexdigest(), sets)


def evaluate_files(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[Path],
    *,
    context_length: int | None,
    batch_size: int,
) -> str:
    """A line per file and one for all of them: bits per byte of the model, of `gzip -9` and of `xz -9e`.

    Raises `UsageError` for a file that is missing, empty or not UTF-8, before anything is computed.
    """
    context_length = context_length or model.config.max_position_embeddings
    texts = {shown(path): read_text(path) for path in paths}
    if empty := [name for name, text in texts.items() if not text]:
        raise UsageError(f"{empty[0]}: is empty")
    rows = [(name, _measure(model, tokenizer, [text], context_length, batch_size)) for name, text in texts.items()]
    if len(texts) > 1:
        rows.append(("all", _measure(model, tokenizer, list(texts.values()), context_length, batch_size)))
    width = max(len(name) for name, _ in rows)
    heading = f"{'bits per byte':<{width}}   model  gzip -9  xz -9e     bytes"
    return "\n".join([heading, *(f"{name:<{width}}  {cells}" for name, cells in rows)])


def _measure(
    model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str], context: int, batch_size: int
) -> str:
    result = evaluate_texts(model, tokenizer, texts, context_length=context, batch_size=batch_size)
    yardstick = compressors(texts)
    return f"{result.bits_per_byte:6.4f}   {yardstick['gzip']:6.4f}  {yardstick['xz']:6.4f}  {result.bytes:>8}"
