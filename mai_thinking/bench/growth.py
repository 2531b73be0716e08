"""Tokens per second of nano's training step as the work grows: experts, context, batch, workers.

One thing grows, the rest is nano's. All sizes of a row of measurements take turns, so that their ratios hold. Besides:
what a token costs in a model of local layers alone, which should not depend on the context.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mai_thinking.bench.learner import BenchLearner, loading
from mai_thinking.bench.machine import Options
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure, Side, Turn, alternate, rate
from mai_thinking.bench.train import CONFIG
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import PreparedData, prepare
from mai_thinking.training.metrics import read_records

TOKENS = 8192
"""Of a step as experts and context grow: one row of the longest context."""
EXPERTS = (64, 128, 256, 512, 1024)
CONTEXTS = (512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16)
WORKERS = (1, 2)
WORKER_ROWS = 2
LOCAL_LAYERS = "context, local layers alone"
WARMUP = 10
"""Steps of a run that do not count."""


def measure(options: Options) -> Result:
    """A quarter of `options.rounds` steps of each size."""
    data = prepare(load_config(PretrainConfig, CONFIG).data)
    by_context = {context: _shape(context, TOKENS // context) for context in CONTEXTS}
    sweeps = {
        "experts": {count: [*_shape(1024, TOKENS // 1024), f"model.num_experts={count}"] for count in EXPERTS},
        "context": by_context,
        LOCAL_LAYERS: by_context,
        "batch": {rows: _shape(1024, rows) for rows in BATCHES},
    }
    rows = [row for name, sizes in sweeps.items() for row in sweep(name, sizes, data, options)]
    notes = ["to first: the rate over that of the first size, in the same rounds", f"a step of {TOKENS:,} tokens"]
    notes += [f"batch: rows of 1,024 tokens. workers: data-parallel, {WORKER_ROWS} rows each, with the run around them"]
    try:
        rows += _workers(options)
    except subprocess.CalledProcessError as error:  # minutes of measurements are there already
        notes.append(f"workers: not measured, since this ended with {error.returncode}: {' '.join(error.cmd)}")
    return Result("growth", rows, notes)


def sweep(
    name: str, sizes: dict[int, list[str]], data: PreparedData, options: Options, config: str = CONFIG
) -> list[Row]:
    """Steps of `config` with each size's changes, in turn."""
    configs = {str(size): load_config(PretrainConfig, config, changes) for size, changes in sizes.items()}
    sides = {size: _steps(changed, data, alone=name == LOCAL_LAYERS) for size, changed in configs.items()}
    turns = alternate(sides, rounds=max(2, options.rounds // 4))
    first = next(iter(turns.values()))
    return [Row({"grows": name, "to": size}, _figures(taken, first)) for size, taken in turns.items()]


def _figures(taken: list[Turn], first: list[Turn]) -> dict[str, Figure]:
    faster = [(b.amount / b.seconds) / (a.amount / a.seconds) for a, b in zip(first, taken, strict=True)]
    return {"rate": rate(taken, "tokens/s"), "to first": Figure.of(faster, "×")}


def _shape(context: int, rows: int, *, ranks: int = 1) -> list[str]:
    """Batches of `rows` rows a rank."""
    sizes = f"context_length: {context}, global_batch_size: {rows * ranks}, micro_batch_size: {rows}"
    return [f"batch={{{sizes}}}"]


def _steps(config: PretrainConfig, data: PreparedData, *, alone: bool) -> Side:
    learner = BenchLearner(config, data, local_layers_alone=alone)
    with loading(config, data, prefetch=0) as loader:
        batch = next(loader)
    return lambda: learner.learn(batch)


def _workers(options: Options) -> list[Row]:
    """Under PyTorch's launcher, in processes of their own, one number of workers after the other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    steps = WARMUP + options.rounds
    taken: dict[int, list[Turn]] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        for workers in WORKERS:
            folder = Path(name) / str(workers)
            changes = [f"output_dir={folder}", f"steps={steps}", "schedule.warmup_steps=0"]
            changes += _shape(1024, WORKER_ROWS, ranks=workers)
            changes += ["checkpoint.every=1000000", "evaluation.every=1000000", "data.held_out.max_bytes=1000"]
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
            environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // workers))}
            command = [*launcher, "-m", "mai_thinking", "pretrain", CONFIG, *changes]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            records = [record for record in read_records(folder / "metrics.jsonl") if "seconds" in record]
            tokens = 1024.0 * WORKER_ROWS * workers
            taken[workers] = [Turn(record["seconds"], tokens) for record in records[WARMUP:]]
    first = taken[WORKERS[0]]
    return [Row({"grows": "workers", "to": str(n)}, _figures(turns, first)) for n, turns in taken.items()]
