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
    _measure(options.what, options.model, options.rounds, as_json=options.json)


def _measure(what: str, model: Path, rounds: int, *, as_json: bool) -> None:
    # Only now: all of it brings torch.
    from mai_thinking.bench.machine import Ceiling, Options, describe
    from mai_thinking.training.allocator import keep_freed_memory

    keep_freed_memory()  # as in training; for both sides
    ceiling = Ceiling()
    ceiling.sample()
    module = importlib.import_module(f"mai_thinking.bench.{what.replace('-', '_')}")
    result = module.measure(Options(model, rounds, ceiling))
    ceiling.sample()
    result.ceiling, result.machine = ceiling.figures(), describe()
    print(result.text(), flush=True)
    if as_json:
        print(result.json(), flush=True)
