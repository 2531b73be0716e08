"""Tokens per second of nano's training step as the work grows: experts, context, batch, workers.

One thing grows, the rest is nano's. All sizes of a row of measurements take turns, so that their ratios hold. Besides:
what a token costs in a model of local layers alone, which should not depend on the context.
"""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from mai_thinking.bench.learner import BenchLearner
from mai_thinking.bench.measure import Result, Row, Side, Turn, alternate, rate, ratio
from mai_thinking.bench.train import CONFIG
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import PreparedData, prepare
from mai_thinking.model.configuration import LOCAL
from mai_thinking.recipes.pretrain import make_loader
from mai_thinking.training.metrics import read_metrics
from mai_thinking.training.model_files import model_config

TOKENS = 8192
"""Of a step as experts and context grow: one row of the longest context."""
LOCAL_LAYERS = "context, local layers alone"
WORKER_ROWS = 2
WARMUP = 10
"""Steps of a run with workers that do not count."""


def measure(model: Path, rounds: int) -> Result:
    """A quarter of `rounds` steps of each size."""
    data = prepare(load_config(PretrainConfig, CONFIG).data)
    by_context = {context: [_shape(context, TOKENS // context)] for context in (512, 1024, 2048, 4096, 8192)}
    counts = (64, 128, 256, 512, 1024)
    sweeps = {
        "experts": {count: [_shape(1024, TOKENS // 1024), f"model.num_experts={count}"] for count in counts},
        "context": by_context,
        LOCAL_LAYERS: by_context,
        "batch": {rows: [_shape(1024, rows)] for rows in (1, 2, 4, 8, 16)},
    }
    rows = [row for name, sizes in sweeps.items() for row in sweep(name, sizes, data, rounds)]
    notes = ["to first: the rate over that of the first size, in the same rounds", f"a step of {TOKENS:,} tokens"]
    notes += [f"batch: rows of 1,024 tokens. workers: data-parallel, {WORKER_ROWS} rows each, with the run around them"]
    return Result(rows + _rows("workers", {workers: _with_workers(workers, rounds) for workers in (1, 2)}), notes)


def sweep(name: str, sizes: dict[int, list[str]], data: PreparedData, rounds: int, config: str = CONFIG) -> list[Row]:
    """Steps of `config` with each size's changes, in turn."""
    sides: dict[str, Side] = {}
    for size, changes in sizes.items():
        run = load_config(PretrainConfig, config, changes)
        architecture = model_config(run, data.tokenizer)
        if name == LOCAL_LAYERS:  # which no config may have: a period ends with a global layer
            architecture.layer_types = [LOCAL] * architecture.num_hidden_layers
        with make_loader(run, data) as loader:
            sides[str(size)] = partial(BenchLearner(run, architecture).learn, next(loader).micro_batches)
    turns = alternate(sides, rounds=max(2, rounds // 4))
    return _rows(name, {size: turns[str(size)] for size in sizes})


def _rows(name: str, turns: dict[int, list[Turn]]) -> list[Row]:
    first = next(iter(turns.values()))
    return [
        Row({"grows": name, "to": size}, {"rate": rate(taken, "tokens/s"), "to first": ratio(first, taken)})
        for size, taken in turns.items()
    ]


def _shape(context: int, rows: int, *, ranks: int = 1) -> str:
    """Batches of `rows` rows a rank."""
    return f"batch={{context_length: {context}, global_batch_size: {rows * ranks}, micro_batch_size: {rows}}}"


def _with_workers(workers: int, rounds: int) -> list[Turn]:
    """Steps of a run under PyTorch's launcher."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        changes = [f"output_dir={folder}/run", f"steps={WARMUP + rounds}", "schedule.warmup_steps=0"]
        changes += ["checkpoint.every=1000000", "evaluation.every=1000000", "data.held_out.max_bytes=1000"]
        changes.append(_shape(1024, WORKER_ROWS, ranks=workers))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        command = [*launcher, "-m", "mai_thinking", "pretrain", CONFIG, *changes]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // workers))}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        records, _ = read_metrics(Path(folder, "run"))
    return [Turn(record["seconds"], 1024.0 * WORKER_ROWS * workers) for record in records[WARMUP:]]
