"""Whether a run has learned to copy what it has read: `python results/two-cores/copying.py RUN …`, in the root.

Tokens by chance, and the same again: a model that looks back for what followed them needs fewer nats the second time.
`… copying.py learn STEPS SEED KEY=VALUE …` asks how soon: it takes the first STEPS of configs/two-cores.yaml, with
these keys changed, on one core. Each run adds a line to copying.jsonl, from which `python scripts/record.py --out
results/two-cores --copying results/two-cores/copying.jsonl` makes the tables.
"""

import json
import sys
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import prepare
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.provenance.lineage import code_version
from mai_thinking.recipes.pretrain import make_loader
from mai_thinking.report.reading import Run
from mai_thinking.training.context import make_accelerator
from mai_thinking.training.learner import Learner, TextLoss
from mai_thinking.training.model_files import build_model, load_model_and_tokenizer, model_config
from mai_thinking.training.process import keep_freed_memory

CONFIG, OUT = "configs/two-cores.yaml", Path(__file__).parent / "copying.jsonl"
LENGTHS, ROWS = (24, 96, 256), 32
SKIPPED = 3
"""Tokens of the second time that stand behind too few others to be known by them."""
LAST = 200
"""Steps whose mean loss is noted."""


@torch.inference_mode()
def nats(model: MaiThinkingForCausalLM, vocabulary: int) -> dict[str, list[float]]:
    """By length of what is repeated: nats per token the first time, and the second."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for length in LENGTHS:
        once = torch.randint(vocabulary // 16, vocabulary, (ROWS, length), generator=draw)
        rows = torch.cat([once, once], dim=1)
        logits = model.eval()(input_ids=rows, use_cache=False).logits[:, :-1].log_softmax(-1)
        each = -logits.gather(-1, rows[:, 1:, None]).squeeze(-1)
        parts = each[:, : length - 1], each[:, length - 1 + SKIPPED :]
        found[str(length)] = [float(part.mean()) for part in parts]
    return found


def finished(folder: Path) -> dict[str, Any]:
    """Of a run that is done, with its held-out bits."""
    run = Run(folder)
    end = run.evaluations[-1]
    model, tokenizer = load_model_and_tokenizer(folder / "final")
    bits = {k.removeprefix("bits_per_byte/"): v for k, v in end.items() if k.startswith("bits_per_byte/")}
    line = {"run": run.name, "seed": run.config["seed"], "tokens": run.steps[-1]["tokens"]}
    return line | {"weighted": end["bits_per_byte"], "nats": nats(model, len(tokenizer)), "bits": bits}


def learned(steps: int, seed: int, changes: list[str]) -> dict[str, Any]:
    """After the first steps of a run that would go on. Runs of a seed read the same rows, and begin with the same
    weights where their shapes agree."""
    config = load_config(PretrainConfig, CONFIG, [f"seed={seed}", "init_by_name=true", *changes])
    keep_freed_memory()
    torch.set_num_threads(1)
    data = prepare(config.data, log=print)
    architecture = model_config(config, data.tokenizer)
    model = build_model(config, architecture)
    learner = Learner(model, config, make_accelerator(config), balance=architecture.router_aux_loss_coef)
    loss, losses, seconds = TextLoss(), list[float](), list[float]()
    with make_loader(config, data) as loader:
        for step in range(1, steps + 1):
            batch, begin = next(loader), time.thread_time()
            losses.append(float(learner.update(batch.micro_batches, loss, step)["loss"]))
            seconds.append(time.thread_time() - begin)
            if step % 50 == 0:
                print(f"{step}: loss {fmean(losses[-50:]):.3f}, {median(seconds):.3f} s a step", flush=True)
    return {
        "changed": changes, "steps": steps, "seed": seed, "loss": fmean(losses[-LAST:]), "seconds": median(seconds),
        "nats": nats(model, len(data.tokenizer)),
    }  # fmt: skip


def main() -> None:
    """A line a run."""
    code_version()  # of what runs, not of what lies there when it is done
    given = sys.argv[1:]
    if given[0] == "learn":
        lines = [learned(int(given[1]), int(given[2]), given[3:])]
    else:
        lines = [finished(Path(folder)) for folder in given]
    for line in lines:
        print(json.dumps(line))
        with OUT.open("a") as file:
            file.write(json.dumps(line | {"commit": code_version().commit}) + "\n")


if __name__ == "__main__":
    main()
