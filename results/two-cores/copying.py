"""Whether a run has learned to copy what it has read: `python results/two-cores/copying.py RUN …`, in the root.

Tokens by chance, and the same again: a model that looks back for what followed them needs fewer nats the second time.
Each run adds a line to copying.jsonl, from which `python scripts/record.py --out results/two-cores --copying
results/two-cores/copying.jsonl` makes the table.
"""

import json
import sys
from pathlib import Path

import torch

from mai_thinking.provenance.lineage import code_version
from mai_thinking.report.reading import Run
from mai_thinking.training.model_files import load_model_and_tokenizer

OUT, LENGTHS, ROWS = Path(__file__).parent / "copying.jsonl", (24, 96, 256), 32
SKIPPED = 3
"""Tokens of the second time that stand behind too few others to be known by them."""


@torch.inference_mode()
def nats(folder: Path) -> dict[str, list[float]]:
    """By length of what is repeated: nats per token the first time, and the second."""
    model, tokenizer = load_model_and_tokenizer(folder)
    draw = torch.Generator().manual_seed(0)
    found = {}
    for length in LENGTHS:
        once = torch.randint(len(tokenizer) // 16, len(tokenizer), (ROWS, length), generator=draw)
        rows = torch.cat([once, once], dim=1)
        logits = model.eval()(input_ids=rows, use_cache=False).logits[:, :-1].log_softmax(-1)
        each = -logits.gather(-1, rows[:, 1:, None]).squeeze(-1)
        parts = each[:, : length - 1], each[:, length - 1 + SKIPPED :]
        found[str(length)] = [float(part.mean()) for part in parts]
    return found


def main() -> None:
    """A line a run."""
    with OUT.open("a") as file:
        for folder in map(Path, sys.argv[1:]):
            run = Run(folder)
            end = run.evaluations[-1]
            line = {"run": run.name, "seed": run.config["seed"], "tokens": run.steps[-1]["tokens"]}
            line |= {"weighted": end["bits_per_byte"], "nats": nats(folder / "final")}
            line |= {
                "bits": {k.removeprefix("bits_per_byte/"): v for k, v in end.items() if k.startswith("bits_per_byte/")}
            }
            file.write(json.dumps(line | {"commit": code_version().commit}) + "\n")
            print(json.dumps(line))


if __name__ == "__main__":
    main()
