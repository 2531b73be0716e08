"""How much of what is missing is mere memory: `python results/two-cores/memory.py RUN`, in the root.

Beside the model of a finished RUN stands an n-gram model of the same tokens: interpolated modified Kneser-Ney (Chen and
Goodman, 1999) over all that the run has read. Both say for each token of what is held out how likely it was, so their
mixture is a distribution too; one of bytes' probabilities by a token's span would not be. Its weight depends on the
longest context that the n-gram model has met, and is learned, by expectation-maximisation, on the documents of the
other half. Adds lines to rivals.jsonl.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mai_thinking.bench.machine import describe
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import prepare
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.recipes.pretrain import make_loader
from mai_thinking.training import evaluation
from mai_thinking.training.model_files import load_model_and_tokenizer

OUT, ORDER = Path(os.environ.get("RIVALS", Path(__file__).parent / "rivals.jsonl")), 8
HELD_OUT_BYTES = int(os.environ.get("HELD_OUT_BYTES", 0)) or None
Array = np.ndarray[Any, Any]


def kneser_ney(read: Array, asked: Array, vocabulary: int, order: int) -> tuple[Array, Array]:
    """For each token of `asked`, its probability after those before it, and how many of these were met as a context in
    what was `read`, up to `order` - 1. Both arrays are token ids."""
    tokens, size = np.concatenate([read, asked]).astype(np.int64), len(read)
    probability = np.full(len(asked), 1 / vocabulary)
    depth = np.zeros(len(asked), dtype=np.int64)
    grams: list[Array] = []  # for each order, which n-gram ends at a position
    for n in range(1, order + 1):
        before = np.zeros(len(tokens), dtype=np.int64) if n == 1 else np.append(0, grams[-1][:-1])
        grams.append(np.unique(before * vocabulary + tokens, return_inverse=True)[1])
    for n in range(1, order + 1):
        gram = grams[n - 1]
        context = np.zeros(len(tokens), dtype=np.int64) if n == 1 else np.append(0, grams[n - 2][:-1])
        # Of the highest order how often an n-gram was met; of a lower one behind how many different tokens.
        _, first = np.unique(grams[n][:size] if n < order else np.arange(size), return_index=True)
        counts = np.bincount(gram[first], minlength=gram.max() + 1)
        discounts = discounts_of(counts)
        seen, at = np.unique(gram[:size], return_index=True)
        contexts = int(context.max()) + 1
        total = np.bincount(context[at], counts[seen], contexts)
        kept = np.bincount(context[at], discounts[np.minimum(counts[seen], 3)], contexts)
        mine, behind = counts[gram[size:]], context[size:]
        known = total[behind] > 0
        share = np.divide(mine - discounts[np.minimum(mine, 3)], total[behind], where=known, out=np.zeros(len(asked)))
        left = np.divide(kept[behind], total[behind], where=known, out=np.ones(len(asked)))
        probability = share + left * probability
        depth = np.where(known, n - 1, depth)
    return probability, depth


def discounts_of(counts: Array) -> Array:
    """What n-grams met 0, 1, 2, and 3 or more times give to those never met."""
    n1, n2, n3, n4 = (max(1, int((counts == times).sum())) for times in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    return np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]).clip(0.0)


def weights_of(model: Array, ngrams: Array, depth: Array) -> Array:
    """For each depth of context the share of the model at which the mixture is the most likely."""
    weight = np.full(ORDER, 0.5)
    for _ in range(50):
        mine = weight[depth] * model
        posterior = mine / (mine + (1 - weight[depth]) * ngrams)
        weight = (np.bincount(depth, posterior, ORDER) + 1) / (np.bincount(depth, minlength=ORDER) + 2)
    return weight


@torch.no_grad()
def likelihoods(model: Any, encoder: Encoder, text: str, context: int) -> tuple[list[int], Array]:
    """A document's tokens, and how likely the model found each, as `evaluate_texts` asks it."""
    found = []
    for inputs, targets in evaluation._windows([text], encoder, context):
        wanted = torch.tensor(targets)
        logits = model(input_ids=torch.tensor([inputs]), use_cache=False).logits[0, wanted != -100]
        found.append(logits.double().softmax(-1).gather(1, wanted[wanted != -100][:, None])[:, 0])
    return [*encoder.encode_prompt(text), encoder.end_of_text], torch.cat(found).numpy()


def main() -> None:
    """Both models, and their mixture, on all that is held out."""
    run = Path(sys.argv[1])
    torch.set_num_threads(1)
    config = load_config(PretrainConfig, run / "config.yaml")
    data = prepare(config.data, log=print)
    model, tokenizer = load_model_and_tokenizer(run / "final")
    encoder, context = Encoder(tokenizer), config.batch.context_length
    with make_loader(config, data) as loader:
        rows = [row.numpy() for _ in range(config.steps) for b in next(loader).micro_batches for row in b["input_ids"]]
    parts, sizes = [], {}
    for category, documents in data.held_out.items():
        texts = evaluation._first_bytes([document.text for document in documents], HELD_OUT_BYTES)
        parts += [(category, *likelihoods(model, encoder, text, context)) for text in texts]
        sizes[category] = sum(len(text.encode()) for text in texts)
        print(category, flush=True)
    # A document's first token is given: it is asked of neither.
    scored = np.concatenate([np.arange(len(tokens)) > 0 for _, tokens, _ in parts])
    asked, mine = np.concatenate([tokens for _, tokens, _ in parts]), np.concatenate([found for *_, found in parts])
    ngrams, depth = (found[scored] for found in kneser_ney(np.concatenate(rows), asked, model.config.vocab_size, ORDER))
    kind = np.concatenate([[category] * len(found) for category, _, found in parts])
    half = np.concatenate([np.full(len(found), index % 2) for index, (*_, found) in enumerate(parts)])
    mixed = np.empty(len(mine))
    for category in sizes:
        for side in (0, 1):
            other, this = (kind == category) & (half != side), (kind == category) & (half == side)
            weight = weights_of(mine[other], ngrams[other], depth[other])[depth[this]]
            mixed[this] = weight * mine[this] + (1 - weight) * ngrams[this]
    bits = {
        name: {c: float(-np.log2(found[kind == c]).sum() / sizes[c]) for c in sizes}
        for name, found in ((config.name, mine), (f"n-grams of up to {ORDER} tokens", ngrams), ("both, mixed", mixed))
    }
    with OUT.open("a") as file:
        for name, by in bits.items():
            line = {"kind": "memory", "what": name, "run": config.name, "seed": config.seed, "bits": by}
            line |= {"weighted": evaluation.weighted_score(by), "machine": describe()}
            file.write(json.dumps(line) + "\n")
            print(json.dumps(line))


if __name__ == "__main__":
    main()
