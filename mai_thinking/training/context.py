"""Where a run takes place: its folder, its ranks and device, and the way to its terminal and its launcher."""

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mai_thinking.config.run import TrainingConfig
from mai_thinking.errors import printable
from mai_thinking.training.checkpoint_storage import visible_steps
from mai_thinking.training.ledger import GoodputLedger, Heartbeat
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


class ProgressLine:
    """Step, loss, tokens per second and time left, on rank 0: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, steps: int, every: float, *, show: bool) -> None:
        self.steps, self.every, self.show = steps, every, show
        self.console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.text = ""
        """Loss, speed and time left after the last step."""
        self.after_last = 0.0
        """Steps that take as long as what comes when the last one is done."""
        self._marks: list[tuple[float, int, int]] = []  # time, step and tokens: the first, and those of late
        self._last_print = 0.0
        self._bar: Progress | None = None
        if show and self.console.is_terminal:
            columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24)
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}", markup=False), console=self.console)
            self._task = self._bar.add_task("training", total=steps, text="")

    def begin(self, step: int) -> AbstractContextManager[object]:
        """Around the steps after `step`."""
        if self._bar is None:
            return nullcontext()
        self._bar.update(self._task, completed=step)
        return self._bar

    def update(self, step: int, tokens: int, loss: float, note: str = "") -> None:
        """After step `step`, which brought the run to `tokens` tokens."""
        now = time.monotonic()
        self._marks.append((now, step, tokens))
        del self._marks[1:-50]
        if not self.show:
            return
        self.text = text = f"loss {loss:.4f}  {self._rate()}  {note}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._last_print >= self.every or step == self.steps:
            self._last_print = now
            self.console.print(f"step {step}/{self.steps}  {text}")

    def _rate(self) -> str:
        """Tokens a second of late, and the time left as all steps but the first took it, with what lay between them."""
        (begin, first, _), (recent, _, before) = self._marks[0], self._marks[-50:][0]
        now, step, tokens = self._marks[-1]
        if now <= recent or step <= first:
            return ""
        left = timedelta(seconds=round((self.steps - step + self.after_last) * (now - begin) / (step - first)))
        return f"{(tokens - before) / (now - recent):,.0f} tokens/s  {left} left"

    def log(self, text: str) -> None:
        """Print a line of its own, above the bar; what a model wrote in it cannot steer the terminal."""
        if self.show:
            self.console.print(printable(text))


class RunContext:
    """What a recipe sees of the run around it, on one rank. Making one touches nothing on the disk."""

    ledger: GoodputLedger
    stop: StopRequest
    """Both are the trainer's."""

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
        self.line = ProgressLine(config.steps, config.tracking.print_every, show=self.rank == 0)

    def log(self, text: str) -> None:
        """A line of its own, from rank 0; on every rank a sign of life."""
        self.heartbeat()
        self.line.log(text)

    def heartbeat(self) -> None:
        """Tell the launcher's watchdog that this rank moves on within something long."""
        self.heart.beat()

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value's sum over all ranks, in float64. Collective."""
        if self.ranks == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))
