"""What a longer prefix is worth: the NLL of a fixed suffix, by the tokens that are shown before it.

MAI-Thinking-1 report App. B.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mai_thinking.config.table import Table
from mai_thinking.data.jsonl import read_text, shown
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.training.evaluation import evaluate_windows

GROWTH = 4
"""The longest prefix is so many times the trained length."""
_MOST = 64
"""Suffixes of a file that are looked at, evenly spread."""


def suffix_nll(
    model: MaiThinkingForCausalLM, tokens: Sequence[int], *, suffix: int, prefixes: Sequence[int], ends: Sequence[int]
) -> dict[int, float]:
    """Nats per token of the `suffix` tokens before each of the `ends`, by the number of tokens shown before them.

    The predicted tokens are the same whatever the prefix. Every end has room for the longest. Leaves the model in the
    mode that it was in.
    """
    found = {}
    for prefix in prefixes:
        windows = [
            (list(tokens[end - suffix - prefix : end - 1]), [-100] * (prefix - 1) + list(tokens[end - suffix : end]))
            for end in ends
        ]
        found[prefix] = evaluate_windows(model, windows, batch_size=1).nll
    return found


def long_context_table(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[Path],
    *,
    suffix: int,
    trained: int,
) -> str:
    """A row for each prefix, from an eighth of the `trained` length to four times of it, doubling. UsageError for a
    file that is shorter than the longest with its suffix."""
    prefixes = [max(1, trained * GROWTH >> halvings) for halvings in range(5, -1, -1)]
    room, encoder = prefixes[-1] + suffix, Encoder(tokenizer)
    total, count = dict.fromkeys(prefixes, 0.0), 0
    for path in paths:
        tokens = encoder.encode_prompt(read_text(path))
        if len(tokens) < room:
            problem = f"{shown(path)}: has {len(tokens):,} tokens, {room:,} are needed"
            raise UsageError(f"{problem}; take a longer text, or set a shorter --context")
        step = max(suffix, -(-(len(tokens) - room) // (_MOST - 1)))
        ends = range(room, len(tokens) + 1, step)
        for prefix, nll in suffix_nll(model, tokens, suffix=suffix, prefixes=prefixes, ends=ends).items():
            total[prefix] += nll * len(ends)
        count += len(ends)
    rows = [(prefix, prefix / trained, nll / count) for prefix, nll in total.items()]
    table = Table(("prefix", "of the trained length", "NLL"), rows, digits=4)
    return f"nats per token of {count} × the same {suffix} tokens\n\n{table.markdown()}"
