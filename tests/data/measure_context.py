"""What a longer prefix is worth to a trained model: `measure_context.py RUN` prints JSON.

The NLL of the same 64 tokens of held-out documents of the run, as the text before them grows from an eighth of the
trained length to four times of it. A document counts once; its suffixes are spread evenly.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import prepare
from mai_thinking.report.comparison import student
from mai_thinking.training.long_context import GROWTH, suffix_nll
from mai_thinking.training.model_files import load_model_and_tokenizer

SUFFIX, SUFFIXES, DOCUMENTS = 64, 4, 8


def measure(run: Path) -> dict[str, Any]:
    """By category of held-out text, and by the prefix's length."""
    config = load_config(PretrainConfig, str(run / "config.yaml"))
    data, trained = prepare(config.data), config.batch.context_length
    model, _ = load_model_and_tokenizer(run)
    prefixes = [trained * GROWTH >> halvings for halvings in range(5, -1, -1)]
    room, found = prefixes[-1] + SUFFIX, {}
    for category, documents in data.held_out.items():
        tokens = (data.encoder.encode_prompt(document.text) for document in documents)
        long = [one for one in tokens if len(one) >= room][:DOCUMENTS]
        if len(long) < 2:
            continue
        nll = [
            suffix_nll(
                model, one, suffix=SUFFIX, prefixes=prefixes,
                ends=[room + (len(one) - room) * place // SUFFIXES for place in range(SUFFIXES)],
            )
            for one in long
        ]  # fmt: skip
        found[category] = {
            "documents": len(long),
            "nll": [student([one[prefix] for one in nll])[0] for prefix in prefixes],
            "against_trained": [student([one[prefix] - one[trained] for one in nll]) for prefix in prefixes],
        }
    parameters = sum(weight.numel() for weight in model.parameters())
    return {"name": config.name, "parameters": parameters, "trained": trained, "prefixes": prefixes, "suffix": SUFFIX,
            "suffixes": SUFFIXES, "categories": found}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(Path(sys.argv[1]))))
