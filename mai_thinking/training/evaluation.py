"""Held-out likelihood: bits per byte by category, the report's weighted score, and compressors as a yardstick.

MAI-Thinking-1 report §2.3: NLL per category, weighted; bits per byte where tokenizers differ.
"""

import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from mai_thinking.data.jsonl import read_text, shown
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.model.loss import logits_product

CATEGORY_WEIGHTS = {"code": 0.5, "stem": 0.175, "maths": 0.175, "general": 0.1, "multilingual": 0.05}
"""The report's weights. Categories without held-out text are left out and the rest scaled to sum to 1."""


@dataclass(frozen=True)
class Likelihood:
    """How well text was predicted."""

    nats: float
    """Σ −log p over the predicted tokens."""
    tokens: int
    bytes: int
    """Length of the same text in UTF-8."""

    @property
    def nll(self) -> float:
        """Nats per token."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers, and with a compressor's ratio."""
        return self.nats / math.log(2) / max(1, self.bytes)


@torch.no_grad()
def evaluate_texts(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    context_length: int,
    batch_size: int,
    heartbeat: Callable[[], None] = lambda: None,
) -> Likelihood:
    """Likelihood of whole documents, each after an end-of-text token and followed by one.

    Windows of `context_length` overlap by half: every token is predicted once, and but for a document's beginning with
    at least half a context before it. The end of a document is predicted too, as in training. `heartbeat` is called
    after each batch of windows. Leaves the model in the
    mode it was in and touches no random generator.
    """
    encoder = Encoder(tokenizer)
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64)
    tokens = 0
    try:
        for windows in _batched(_windows(texts, encoder, context_length), batch_size):
            inputs, targets = _pad(windows, encoder.end_of_text)
            inputs, targets = inputs.to(model.device), targets.to(model.device)
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            scored = targets != -100
            weight = model.lm_head.weight
            dtype = model.model.half_precision or weight.dtype
            with torch.autocast(model.device.type, enabled=False):
                logits = logits_product(hidden[scored].to(dtype), weight.to(dtype))
            nats += F.cross_entropy(logits, targets[scored], reduction="sum").double().cpu()
            tokens += int(scored.sum())
            heartbeat()
    finally:
        model.train(was_training)
    return Likelihood(float(nats), tokens, sum(len(text.encode()) for text in texts))


Window = tuple[list[int], list[int]]
"""Input tokens, and for each the next one or -100 where another window predicts it."""


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


def _pad(windows: Sequence[Window], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def compressors(texts: Sequence[str]) -> dict[str, float]:
    """What general-purpose compressors make of the same bytes, all documents in one stream: bits per byte of `gzip -9`
    and `xz -9e`."""
    content = "".join(texts).encode()
    bits = 8 / max(1, len(content))
    return {
        "gzip": len(gzip.compress(content, compresslevel=9, mtime=0)) * bits,
        "xz": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) * bits,
    }


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
