"""What every training loop has around its steps: a claimed folder, a ledger, metrics, checkpoints, a way to stop."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mai_thinking.config.command import EXIT_INTERRUPTED
from mai_thinking.config.run import TrainingConfig
from mai_thinking.config.storage import atomic_folder
from mai_thinking.data import PreparedData
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.provenance.lineage import (
    CodeVersion,
    Lineage,
    Source,
    record_checkpoint,
    record_model,
    record_traces,
    resuming_from,
)
from mai_thinking.training.allocator import keep_freed_memory
from mai_thinking.training.checkpoint import Checkpointer, State
from mai_thinking.training.checkpoint_storage import step_folder
from mai_thinking.training.goodput import CHECKPOINT, GoodputLedger
from mai_thinking.training.metrics import MetricsLog, Record
from mai_thinking.training.model_files import save_model
from mai_thinking.training.progress import ProgressLine
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.survivor import Survivor
from mai_thinking.training.worker import StopRequest, wait_for_savers


def init_distributed(**options: Any) -> Accelerator:
    """Where the ranks of a job meet, whoever started them: an `Accelerator`. On a machine without an accelerator that
    takes them for separate runs unless it is told. Nobody has touched the job's folders before."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    wait_for_savers()
    return accelerator


def make_accelerator(config: TrainingConfig, folder: RunFolder) -> Accelerator:
    """Device, ranks, precision and trackers, as the config and the launcher say."""
    precision = config.execution.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    return init_distributed(
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(config.tracking.trackers) or None,
        project_dir=str(folder.path / "trackers"),
        step_scheduler_with_optimizer=False,
    )


class Loop(Protocol):
    """A training loop, ready to go."""

    def run(self) -> int:
        """To the end, or until it is asked to stop; the exit code."""


def run_in_folder(config: TrainingConfig, start: Callable[[RunFolder, Accelerator, ExitStack], Loop]) -> int:
    """Run a loop in its config's folder, or go on with it where it was; the exit code. A finished run is left alone."""
    keep_freed_memory()
    folder = RunFolder(config.folder)
    folder.check(config)
    if folder.finished:
        print(f"{folder.path} is finished: see {folder.report}/summary.md. Another name or seed makes another run.")
        return 0
    with ExitStack() as stack:
        return start(folder, make_accelerator(config, folder), stack).run()


class Session:
    """One process of a run, from the claim on its folder to its end. Constructing one is collective.

    Make it when everything that can be wrong with the config has been seen: whoever corrects a mistake finds no folder
    that belongs to it. What it opens is closed with `stack`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        folder: RunFolder,
        accelerator: Accelerator,
        stack: ExitStack,
        *,
        parent: Lineage,
        data: PreparedData | Sequence[Source],
        traces: Sequence[Lineage] = (),
    ) -> None:
        """`parent` is where the first weights come from, `data` and `traces` what the run learns from: for the records
        of what it leaves (`mai_thinking.provenance.lineage`)."""
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        if self.rank == 0:
            stack.enter_context(folder.claim(config))
        self.ledger = GoodputLedger(folder.events, enabled=self.rank == 0)
        self.stop = StopRequest()
        self.checkpointer = Checkpointer(
            folder.checkpoints, config.checkpoint, lambda path: record_checkpoint(path, **self._origin())
        )
        self._parents, self._data = [parent, *traces], data
        self._earlier_code: tuple[CodeVersion, ...] = ()
        self._metrics: MetricsLog | None = None
        self._last_record: tuple[Record, tuple[str, ...]] | None = None
        self._line: ProgressLine | None = None
        stack.callback(self._close)

    def resume(self, state: State) -> int:
        """Load the newest good checkpoint, if there is one, into `state`; the step to go on from. Opens the logs."""
        step = self.checkpointer.load_latest(state) or 0
        # Another number of ranks adds in another order.
        same_ranks = self.checkpointer.loaded_world in (None, self.ranks)
        if self.rank == 0:
            self._metrics = MetricsLog(self.folder.metrics, tolerance=0.0 if same_ranks else 1e-3)
        tracking = self.config.tracking
        self._line = ProgressLine(self.config.steps, done=step, every=tracking.print_every, show=self.rank == 0)
        if tracking.trackers:
            about = {"name": self.config.name, "seed": self.config.seed}
            self.accelerator.init_trackers(self.config.name, config=about)
        if step:
            checkpoint = step_folder(self.folder.checkpoints, step)
            self._parents, self._earlier_code = resuming_from(checkpoint, self._parents)
            self.say(f"going on after step {step}")
        return step

    @property
    def line(self) -> ProgressLine:
        """The progress line; there once `resume` was called."""
        assert self._line is not None
        return self._line

    def record(self, record: Record, *, exact: tuple[str, ...] = ("loss", "grad_norm")) -> None:
        """To metrics.jsonl and the trackers; `exact` fields must come out alike when a step is computed again."""
        self._last_record = record, exact
        if self._metrics is not None:
            self._metrics.append(record, exact=exact)
        if self.config.tracking.trackers:
            numbers: dict[str, Any] = {k: v for k, v in record.items() if isinstance(v, int | float)}
            self.accelerator.log(numbers, step=record["step"])

    def save(self, step: int, state: State, *, synchronous: bool = False) -> None:
        """Save a checkpoint. Collective."""
        if self._metrics is not None:
            self._metrics.synchronise()
        with self.ledger.span(CHECKPOINT):
            self.checkpointer.save(step, state, synchronous=synchronous)

    def stop_after(self, step: int, state: Callable[[], State]) -> bool:
        """After each step: save if a checkpoint is due or the run was asked to stop; whether it is to stop now, saved.
        Collective."""
        stopping = self.stop.agreed()
        if self.checkpointer.due(step) or stopping:
            self.save(step, state(), synchronous=stopping)
        return stopping

    def survivor(self, optimizer: torch.optim.Optimizer, state: Callable[[], State]) -> Survivor:
        """Ready to save the run when another rank is gone. Collective; see `Survivor`."""
        return Survivor(self.checkpointer, optimizer, state, self.ledger.announce)

    def record_for_the_dead(self, step: int) -> None:
        """Rank 0 may have died between an update and its record: write what it would have written of `step`."""
        if self._last_record is not None and self._last_record[0]["step"] == step:
            record, exact = self._last_record
            with closing(MetricsLog(self.folder.metrics)) as log:
                log.append(record, exact=exact)

    def end_interrupted(self, step: int) -> int:
        """Stopped on request after `step`, which is saved; the exit code."""
        self.say(f"stopped after step {step}, which is saved; the same command goes on with it")
        self.ledger.end("interrupted")
        return EXIT_INTERRUPTED

    def save_architecture(self, architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """What the run's checkpoints need to be read as models."""
        if self.rank == 0 and not self.folder.architecture.exists():
            with atomic_folder(self.folder.architecture) as path:
                architecture.save_pretrained(path)
                tokenizer.save_pretrained(path)

    def save_final(self, model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerBase, step: int) -> None:
        """The run's model folder, with its record. On rank 0, last of all: a run with this folder is finished."""
        save_model(model, tokenizer, self.folder.final, lambda path: record_model(path, **self._origin(), steps=step))
        self.say(f"\nmodel in {self.folder.final}, report in {self.folder.report}/summary.md")

    def record_traces(self, traces: Path, step: int) -> None:
        """Record a folder of traces that has grown. On rank 0, when all ranks have written."""
        origin = self._origin()
        (parent,) = origin.pop("parents")
        record_traces(traces, parent=parent, **origin, steps=step)

    def say(self, text: str) -> None:
        """A line of its own, from rank 0."""
        if self._line is not None:
            self._line.log(text)
        elif self.rank == 0:
            print(text, flush=True)

    def _origin(self) -> dict[str, Any]:
        """What the records of this run's checkpoints, traces and model have in common."""
        return {
            "parents": self._parents,
            "config": self.folder.config,
            "data": self._data,
            "seed": self.config.seed,
            "code": self._earlier_code,
        }

    def _close(self) -> None:
        """Leave no thread and no half-written file behind."""
        self.stop.close()
        self.checkpointer.close()
        if self._metrics is not None:
            self._metrics.close()
        # Accelerate's `end_training` would also take the ranks' connection from the next run of this process.
        for tracker in self.accelerator.trackers:
            tracker.finish()
