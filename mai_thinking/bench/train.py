"""A training step of nano with our experts, and with the library's fastest for training in their place."""

import itertools
from contextlib import ExitStack

from mai_thinking.bench.apart import Apart
from mai_thinking.bench.learner import Learner, loading
from mai_thinking.bench.options import Options
from mai_thinking.bench.profile import profile_rows
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Side, alternate, milliseconds, rate, ratio
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import prepare

CONFIG = "configs/nano.yaml"
SIDES = {"ours": "bucketed_mm", "grouped_mm": "grouped_mm"}
PROFILED_STEPS = 10


def measure(options: Options) -> Result:
    """configs/nano.yaml, fresh weights."""
    return compare(load_config(PretrainConfig, CONFIG), options)


def compare(config: PretrainConfig, options: Options) -> Result:
    """The same model on the same batches with either, each in its own process; then where our steps' time goes."""
    prepare(config.data)  # once, before two processes look for it
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Apart(make_side)).make(_with_experts(config, experts))
            for name, experts in SIDES.items()
        }
        turns = alternate(sides, rounds=options.rounds, warmup=3)
    theirs, ours = turns["grouped_mm"], turns["ours"]
    row = Row(
        {"model": config.name, "tokens": config.batch.tokens_per_step},
        {
            "ours": milliseconds(ours),
            "grouped_mm": milliseconds(theirs),
            "ratio": ratio(theirs, ours),
            "ours, rate": rate(ours, "tokens/s"),
        },
    )
    step = make_side(config)
    for _ in range(3):
        step()

    def profiled() -> None:
        for _ in range(PROFILED_STEPS):
            step()

    notes = [f"shares: operators' own time in {PROFILED_STEPS} of our steps"]
    return Result("train", [row, *profile_rows(profiled)], notes)


def make_side(config: PretrainConfig) -> Side:
    """A step of `config`'s model from fresh weights, on eight batches over and over; tokens in it."""
    data = prepare(config.data)
    with loading(config, data) as loader:
        batches = itertools.cycle([next(loader) for _ in range(8)])
    learner = Learner(config, data)
    return lambda: learner.learn(next(batches))


def _with_experts(config: PretrainConfig, experts: str) -> PretrainConfig:
    return config.model_copy(update={"execution": config.execution.model_copy(update={"experts": experts})})
