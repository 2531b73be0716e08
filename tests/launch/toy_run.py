"""A small data-parallel training script with all the machinery of a real one: `toy_run.py FOLDER [name=value …]`.

steps=N, every=N, sleep=SECONDS a step, crash=STEP (raises there), refuse=1 (a usage error), omit=NAME (leave that state
out of the checkpoint: the negative controls).
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mai_thinking.config.command import EXIT_INTERRUPTED, exit_with
from mai_thinking.config.run import CheckpointSection
from mai_thinking.errors import UsageError
from mai_thinking.training.checkpoint import Checkpointer
from mai_thinking.training.ledger import CHECKPOINT, GoodputLedger
from mai_thinking.training.metrics import MetricsLog
from mai_thinking.training.state import ModelState, OptimizerState, PerRank, RandomState
from mai_thinking.training.stop import StopRequest


class Loader:
    """Document numbers in an order of its own generator; each rank takes every world-th."""

    def __init__(self) -> None:
        self.position = 0

    def next(self) -> int:
        self.position += 1
        return int(torch.randint(1000, (), generator=torch.Generator().manual_seed(self.position)))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def main() -> int:
    folder = Path(sys.argv[1])
    options = {"steps": "20", "every": "5", "sleep": "0.02", "crash": "0", "refuse": "", "omit": ""}
    options |= dict(argument.split("=") for argument in sys.argv[2:])
    if options["refuse"]:
        raise UsageError("the config is refused")
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    print(f"toy: {rank} of {world}, process {os.getpid()}")
    ledger = GoodputLedger(folder / "events.jsonl", enabled=rank == 0)
    stop = StopRequest()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.3), nn.Linear(32, 16))
    torch.manual_seed(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    counters, loader = torch.zeros(4), Loader()
    state = {
        "model": ModelState(model),
        "optimizer": OptimizerState(model, optimizer),
        "counters": counters,
        "loader": loader,
        "random": PerRank(RandomState()),
    }
    state.pop(options["omit"], None)
    checkpointer = Checkpointer(folder / "checkpoints", CheckpointSection(every=int(options["every"]), keep=3))
    step = checkpointer.load_latest(state) or 0
    counters = state.get("counters", counters)
    log = MetricsLog(folder / "metrics.jsonl") if rank == 0 else None

    while step < int(options["steps"]):
        begin = time.perf_counter()
        step += 1
        if step == int(options["crash"]):
            raise ValueError(f"crash asked for at step {step}")
        document = loader.next()
        loss = model(torch.sin(torch.arange(16.0) * (document + rank))).square().mean() + counters.sum() * 0.01
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        counters += torch.rand(4, generator=torch.Generator().manual_seed(step))
        shared = loss.detach().clone()
        dist.all_reduce(shared)
        time.sleep(float(options["sleep"]))
        if log:
            log.append({"step": step, "loss": float(shared), "grad_norm": float(norm), "document": document})
        ledger.step(step, time.perf_counter() - begin)
        stopping = stop.agreed()
        if checkpointer.due(step) or stopping:
            with ledger.span(CHECKPOINT):
                checkpointer.save(step, state, synchronous=stopping)
        if stopping:
            checkpointer.close()
            ledger.end("interrupted")
            return EXIT_INTERRUPTED
    checkpointer.save(step, state, synchronous=True)
    checkpointer.close()
    ledger.end("done")
    return 0


if __name__ == "__main__":
    exit_with(main)
