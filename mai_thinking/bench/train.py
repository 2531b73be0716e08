"""A training step of nano with our experts, and with the library's fastest for training in their place."""

import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mai_thinking.bench.learner import BenchLearner
from mai_thinking.bench.measure import Figure, Result, Row, alternate, milliseconds, profile_rows, rate, ratio
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import Batch, PreparedData, prepare
from mai_thinking.recipes.pretrain import make_loader
from mai_thinking.training.model_files import model_config

CONFIG = "configs/nano.yaml"
SIDES = {"ours": "bucketed_mm", "grouped_mm": "grouped_mm"}


def measure(model: Path, rounds: int) -> Result:
    """configs/nano.yaml, fresh weights."""
    return compare(load_config(PretrainConfig, CONFIG), rounds)


def compare(config: PretrainConfig, rounds: int) -> Result:
    """The same model, batch after batch, with either; then where our steps spend their time."""
    data = prepare(config.data)
    with make_loader(config, data) as loader:
        batches = [next(loader) for _ in range(8)]
    learners = {}
    for side, experts in SIDES.items():
        execution = config.execution.model_copy(update={"experts": experts})
        run = config.model_copy(update={"execution": execution})
        learners[side] = BenchLearner(run, model_config(run, data.tokenizer))

    def step(learner: BenchLearner, own: Iterator[Batch]) -> float:
        return learner.learn(next(own).micro_batches)

    sides = {side: partial(step, learner, itertools.cycle(batches)) for side, learner in learners.items()}
    turns = alternate(sides, rounds=rounds, warmup=3)
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
    waiting = Figure.of([_waiting(learners["ours"], config, data, rounds)], "%")
    notes = [
        f"waiting: for data, of {rounds} steps together; batches are made in a thread beside them",
        "share: an operator's own time in one of our steps",
    ]
    return Result([row, Row({"": "ours, with the loader"}, {"waiting": waiting}), *profile_rows(sides["ours"])], notes)


def _waiting(learner: BenchLearner, config: PretrainConfig, data: PreparedData, rounds: int) -> float:
    """Percent of the time of steps as a run takes them, but for the first three: the thread has to start."""
    waits, wholes = [], []
    with make_loader(config, data) as loader:
        for _ in range(rounds + 3):
            begin = time.perf_counter()
            learner.learn(next(loader).micro_batches)
            wholes.append(time.perf_counter() - begin)
            waits.append(loader.wait_seconds)
    return 100.0 * sum(waits[3:]) / sum(wholes[3:])
