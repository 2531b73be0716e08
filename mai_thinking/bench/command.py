"""`python scripts/bench.py WHAT`: which measurements there are, and how one is asked for."""

import importlib
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mai_thinking.config.command import Parser, option

Rounds = Annotated[int, Field(ge=2, le=10_000)]
"""A spread takes at least 2."""

BENCHES = {
    "moe": "our experts against the library's: training at 512 and 4,096 tokens, decoding at 1 to 64",
    "train": "a training step of nano with our experts and with the library's, its wait for data, where its time goes",
    "card": "configs/L12.yaml on one GPU: tokens per second, utilisation and memory, ours and the library's",
    "rollout": "our engine against `generate`, response lengths as they fall and all equal",
    "grpo": "a whole step of the climb against one of TRL's GRPOTrainer",
    "growth": "tokens per second against experts, context, batch and workers",
    "checkpoint": "what saving costs the loop, asynchronously and synchronously",
    "exchange": "experts divided over two ranks, in 1 to 8 groups, over memory and over a link that takes no core",
    "zero-start": "expert load at initialisation, attention's output gains ordinary or zero",
}


def run(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = Parser(
        "Measure, each benchmark its sides in turn in one run:\n\n"
        + "\n".join(f"{name:<12} {what}" for name, what in BENCHES.items())
        + "\n\nFigures are medians, with quartiles in brackets.",
    )
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("model", type=Path, nargs="?", default=Path("runs/nano/final"), help="for rollout and grpo")
    parser.add_argument(
        "--rounds", type=option(Rounds), default=15, help="how often each side has its turn (default: 15)"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object, in the last line")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Only now: all of it brings torch.
    from mai_thinking.bench.machine import describe, sample_ceiling
    from mai_thinking.bench.measure import as_json, as_text, rate
    from mai_thinking.training.process import keep_freed_memory

    keep_freed_memory()  # as in training; for both sides
    module = importlib.import_module(f"mai_thinking.bench.{options.what.replace('-', '_')}")
    before = sample_ceiling()
    result = module.measure(options.model, options.rounds)
    after = sample_ceiling()
    units = {"product": "GFLOP/s", "copy": "GB/s"}
    ceiling = {name: rate([*before[name], *after[name]], unit) for name, unit in units.items()}
    print(as_text(result, ceiling, describe()), flush=True)
    if options.json:
        print(as_json(options.what, result, ceiling, describe()), flush=True)
