"""Where a run takes place: its folder, its ranks and device, and the way to its terminal and its launcher."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from mai_thinking.config.run import TrainingConfig
from mai_thinking.training.checkpoint_storage import visible_steps
from mai_thinking.training.heartbeat import Heartbeat
from mai_thinking.training.ledger import GoodputLedger
from mai_thinking.training.progress import ProgressLine
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.stop import StopRequest, wait_for_savers


def init_distributed(**options: Any) -> Accelerator:
    """Where the ranks of a job meet, whoever started them: an `Accelerator`. On a machine without an accelerator that
    takes them for separate runs unless it is told. Nobody has touched the job's folders before."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    wait_for_savers()
    return accelerator


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Device, ranks, precision and trackers, as the config and the launcher say."""
    precision = config.execution.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    return init_distributed(
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(config.tracking.trackers) or None,
        project_dir=str(config.folder / "trackers"),
        step_scheduler_with_optimizer=False,
    )


class RunContext:
    """What a recipe sees of the run around it, on one rank. Making one touches nothing on the disk."""

    def __init__(self, config: TrainingConfig, stack: ExitStack) -> None:
        """What is entered into `stack` is left when the run ends, however it ends."""
        self.stack = stack
        self.folder = RunFolder(config.folder)
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.resuming = bool(visible_steps(self.folder.checkpoints))
        """Whether there is a checkpoint, from which the weights will come."""
        self.heart = Heartbeat(self.folder.path)
        self.line: ProgressLine | None = None
        self.ledger: GoodputLedger | None = None
        self.stop: StopRequest | None = None

    def log(self, text: str) -> None:
        """A line of its own, from rank 0; on every rank a sign of life."""
        self.heartbeat()
        if self.line is not None:
            self.line.log(text)
        elif self.rank == 0:
            print(text, flush=True)

    def heartbeat(self) -> None:
        """Tell the launcher's watchdog that this rank moves on within something long."""
        self.heart.beat()

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return self.stop is not None and self.stop.agreed()

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value's sum over all ranks, in float64. Collective."""
        if self.ranks == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))
