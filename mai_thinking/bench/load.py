"""What the loader costs a training step."""

import time

from mai_thinking.bench.learner import BenchLearner, loading
from mai_thinking.bench.options import Options
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure
from mai_thinking.bench.train import CONFIG
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import prepare


def measure(options: Options) -> Result:
    """configs/nano.yaml."""
    return compare(load_config(PretrainConfig, CONFIG), options)


def compare(config: PretrainConfig, options: Options) -> Result:
    """Steps as a run takes them: the wait for each batch, beside the whole step; and what making a batch takes."""
    data = prepare(config.data)
    learner = BenchLearner(config, data)
    waits, wholes, makes = [], [], []
    with loading(config, data) as loader:
        for number in range(options.rounds + 3):
            begin = time.perf_counter()
            learner.learn(next(loader))
            if number >= 3:  # the first waits for the thread to start
                wholes.append(time.perf_counter() - begin)
                waits.append(loader.wait_seconds)
    with loading(config, data, prefetch=0) as loader:
        for _ in range(options.rounds):
            next(loader)
            makes.append(loader.wait_seconds)
    row = Row(
        {"model": config.name, "tokens": config.batch.tokens_per_step},
        {
            "step": Figure.of((1e3 * seconds for seconds in wholes), "ms"),
            "wait": Figure.of((1e3 * seconds for seconds in waits), "ms"),
            "waiting": Figure.of([100 * sum(waits) / sum(wholes)], "%"),
            "to make a batch": Figure.of((1e3 * seconds for seconds in makes), "ms"),
        },
    )
    note = "waiting: of all steps' time together. A batch is made in a thread beside the steps."
    return Result("load", [row], [note])
