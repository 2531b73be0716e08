"""A training step of nano with our experts, and with the library's fastest for training in their place."""

import time

from mai_thinking.bench.learner import BenchLearner, loading
from mai_thinking.bench.machine import Options
from mai_thinking.bench.profile import profile_rows
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure, alternate, milliseconds, rate, ratio
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import Batch, PreparedData, prepare

CONFIG = "configs/nano.yaml"
SIDES = {"ours": "bucketed_mm", "grouped_mm": "grouped_mm"}
PROFILED_STEPS = 10


def measure(options: Options) -> Result:
    """configs/nano.yaml, fresh weights."""
    return compare(load_config(PretrainConfig, CONFIG), options)


def compare(config: PretrainConfig, options: Options) -> Result:
    """The same model, batch after batch, with either; then where our steps spend their time."""
    data = prepare(config.data)
    batches: list[Batch] = []
    with loading(config, data) as loader:
        batches += (next(loader) for _ in range(8))
    learners = {name: BenchLearner(_with_experts(config, experts), data) for name, experts in SIDES.items()}
    number = dict.fromkeys(SIDES, 0)

    def step(name: str) -> float:
        number[name] += 1
        return learners[name].learn(batches[number[name] % len(batches)])

    turns = alternate({name: lambda name=name: step(name) for name in SIDES}, rounds=options.rounds, warmup=3)  # type: ignore[misc]
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

    def profiled() -> None:
        for _ in range(PROFILED_STEPS):
            step("ours")

    notes = [
        f"waiting: for data, of {options.rounds} steps together; batches are made in a thread beside them",
        f"shares: operators' own time in {PROFILED_STEPS} of our steps",
    ]
    waiting = Row(
        {"": "ours, with the loader"}, {"waiting": Figure.of([_waiting(learners["ours"], config, data, options)], "%")}
    )
    return Result("train", [row, waiting, *profile_rows(profiled)], notes)


def _waiting(learner: BenchLearner, config: PretrainConfig, data: PreparedData, options: Options) -> float:
    """Percent of the time of steps as a run takes them, but for the first three: the thread has to start."""
    waits, wholes = [], []
    with loading(config, data) as loader:
        for _ in range(options.rounds + 3):
            begin = time.perf_counter()
            learner.learn(next(loader))
            wholes.append(time.perf_counter() - begin)
            waits.append(loader.wait_seconds)
    return 100.0 * sum(waits[3:]) / sum(wholes[3:])


def _with_experts(config: PretrainConfig, experts: str) -> PretrainConfig:
    return config.model_copy(update={"execution": config.execution.model_copy(update={"experts": experts})})
