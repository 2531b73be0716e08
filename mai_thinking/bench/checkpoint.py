"""What saving costs the loop: train nano and save every tenth step, in turn in the background and at once."""

import contextlib
import tempfile
import time
from pathlib import Path
from statistics import median

from mai_thinking.bench.measure import Figure, Result, Row
from mai_thinking.bench.train import CONFIG
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.recipes.pretrain import PretrainRecipe
from mai_thinking.training.context import RunContext
from mai_thinking.training.trainer import Trainer

EVERY = 10


def measure(model: Path, rounds: int) -> Result:
    """Half of `rounds` saves each way, and one more of each that does not count."""
    saves = 2 * (rounds // 2 + 1)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name, contextlib.ExitStack() as stack:
        config = load_config(PretrainConfig, CONFIG, [f"output_dir={name}/run", "steps=10000"])
        trainer = Trainer(config, PretrainRecipe(config, RunContext(config, stack)))
        cost: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
        steps: list[float] = []
        while trainer.step < EVERY * saves + EVERY // 2:
            begin = time.perf_counter()
            trainer.take_step()
            steps.append(time.perf_counter() - begin)
            trainer.checkpointer.due(trainer.step)
            if trainer.step % EVERY == 0:
                synchronous = trainer.step // EVERY % 2 == 0
                cost[synchronous].append((trainer.save(synchronous=synchronous), len(steps)))
    usual = median(steps)
    rows, whole = [], {}
    for synchronous, marks in cost.items():
        # The last save has no nine steps behind it.
        after = [sum(steps[at : at + 9]) - 9 * usual for _, at in marks[1:] if at + 9 <= len(steps)]
        stalls, slower = Figure.of((seconds for seconds, _ in marks[1:]), "s"), Figure.of(after, "s")
        whole[synchronous] = stalls.median + max(0.0, slower.median)
        word = "synchronous" if synchronous else "asynchronous"
        rows.append(Row({"save": word}, {"stall": stalls, "nine steps after it, over nine others": slower}))
    rows.append(Row({"": "a step"}, {"step": Figure.of(steps, "s")}))
    rows.append(Row({"": "asynchronous / synchronous"}, {"cost": Figure.of([whole[False] / whole[True]], "×")}))
    return Result(rows, [])
