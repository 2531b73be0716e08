"""One run of any recipe: its folder, resume, the loop, evaluation, checkpoints, requests to stop, and the end.

Everything that decides what comes next is in a checkpoint, so that a run that was killed anywhere ends as the
undisturbed one does, bit for bit (MAI-Thinking-1 report §2.8).
"""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from mai_thinking.config.command import EXIT_INTERRUPTED
from mai_thinking.config.run import TrainingConfig
from mai_thinking.config.storage import atomic_folder
from mai_thinking.data import PreparedData
from mai_thinking.errors import DataError, RunError, UsageError, one_line
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.provenance.lineage import (
    CodeVersion,
    Lineage,
    Source,
    record_checkpoint,
    record_model,
    record_traces,
    resuming_from,
)
from mai_thinking.training.checkpoint import Checkpointer
from mai_thinking.training.checkpoint_storage import step_folder
from mai_thinking.training.context import RunContext
from mai_thinking.training.jit_checkpoint import JitCheckpoint
from mai_thinking.training.learner import Learner
from mai_thinking.training.ledger import CHECKPOINT, GoodputLedger
from mai_thinking.training.metrics import MetricsLog, Record, read_records
from mai_thinking.training.model_files import save_model
from mai_thinking.training.process import keep_freed_memory
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.state import PerRank, RandomState
from mai_thinking.training.stop import StopRequest


class Step(NamedTuple):
    """What a recipe reports of an update: metrics for metrics.jsonl, the tokens that all ranks learned from, a note for
    the progress line, and the seconds that it waited for its data."""

    metrics: dict[str, Any]
    tokens: int
    note: str = ""
    data_wait: float = 0.0


class Ending(NamedTuple):
    """Why a run ends before its last step, how that is called in the goodput ledger, and its exit code: with another
    than 0 the run leaves no model."""

    reason: str
    how: str = "done"
    exit_code: int = 0


class Recipe(ABC):
    """What is special about a kind of run. Its parts are built when it is made, in the order in which they depend on
    each other, and everything that can be wrong with the config shows then: no folder is claimed before."""

    context: RunContext
    learner: Learner
    architecture: MaiThinkingConfig
    tokenizer: PreTrainedTokenizerBase
    parents: Sequence[Lineage]
    """Where the first weights come from, then what else is learned from, if it has a record."""
    data: PreparedData | Sequence[Source]
    exact: tuple[str, ...] = ("loss", "grad_norm")
    """Metrics of a step that must come out alike when it is computed again."""
    exact_evaluation: tuple[str, ...] = ()  # the same of an evaluation
    draws_by_rank: bool = False  # whether another number of ranks learns from other data
    evaluate_every: int | None = None  # steps
    evaluate_first: bool = False  # whether there is an evaluation before the first step
    traces: Path | None = None  # a folder of traces that the run adds to
    ending: Ending | None = None  # set by the recipe when the run is to end

    @abstractmethod
    def describe(self) -> str:
        """What the run is and costs."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the learner and the generators; see `training.checkpoint.State`."""

    @abstractmethod
    def step(self, step: int) -> Step | None:
        """Make update `step`; None if there is nothing to learn from and `ending` says why. No rank talks to another
        after the weights have changed. Collective."""

    def progress(self) -> dict[str, Any]:
        """JSON values that a checkpoint holds beside the number of steps and tokens."""
        return {}

    def load_progress(self, progress: dict[str, Any]) -> None:  # noqa: B027 - most have none
        """Go on from `progress()`."""

    def evaluate(self, step: int, *, last: bool) -> dict[str, Any] | None:
        """Metrics on what was held out; `last` at the end of the run. None if it was asked to stop. Collective."""
        return {}

    def show(self, step: int) -> None:  # noqa: B027 - most have nothing
        """Let people see, now and then, what the model does by now; nothing may depend on it. After each step."""

    @abstractmethod
    def report(self) -> None:
        """Write, on rank 0, what the run has to show, when all traces are written. Collective."""


def run_recipe(config: TrainingConfig, make: Callable[[Any, RunContext], Recipe]) -> int:
    """Run in the config's folder, or go on where it was; the exit code. A finished run is left alone."""
    keep_freed_memory()
    folder = RunFolder(config.folder)
    folder.check(config)
    if folder.finished:
        print(f"{folder.path} is finished: see {folder.report}/summary.md. Another name or seed makes another run.")
        return 0
    with ExitStack() as stack:
        return Trainer(config, make(config, RunContext(config, stack))).run()


class Trainer:
    """One process of a run, from the claim on its folder to its end. Constructing one is collective, and resumes."""

    def __init__(self, config: TrainingConfig, recipe: Recipe) -> None:
        self.config, self.recipe, self.context, self.learner = config, recipe, recipe.context, recipe.learner
        context = self.context
        self.folder = context.folder
        self.is_main = context.rank == 0
        if self.is_main:
            context.stack.enter_context(self.folder.claim(config))
        self.ledger = context.ledger = GoodputLedger(self.folder.events, enabled=self.is_main, heartbeat=context.heart)
        self.stop = context.stop = StopRequest()
        self.checkpointer = Checkpointer(
            self.folder.checkpoints,
            config.checkpoint,
            seal=lambda path: record_checkpoint(path, **self._origin()),
            heartbeat=context.heartbeat,
        )
        self._parents: list[Lineage] = list(recipe.parents)
        self._earlier_code: tuple[CodeVersion, ...] = ()
        self._metrics: MetricsLog | None = None
        self._last_record: Record | None = None
        context.stack.callback(self._close)
        # Dropout alone draws from the global generators; every rank has its own. Python's and NumPy's too, for whoever
        # adds something that draws from them.
        set_seed(config.seed + 1_000_003 * (1 + context.rank))
        self.step = self.tokens = 0
        self._check_room()
        self._resume()
        # Read before anybody writes to them, so that all ranks know the same.
        self._evaluated = {r["step"] for r in read_records(self.folder.metrics) if r.get("kind") == "evaluation"}
        self._jit: JitCheckpoint | None = None
        # On a GPU a dead peer leaves the others waiting in a stream, where no error reaches them.
        if context.ranks > 1 and not self.learner.divided and context.device.type == "cpu":
            self._jit = JitCheckpoint(
                self.checkpointer, self.learner.optimizer, self.state, self.folder.ranks, context.heart.announce
            )
            jit = self._jit
            self.learner.before_reduction = lambda: jit.before_reduction(self.step + 1)

    def run(self) -> int:
        """Train to the last step, or until the recipe ends the run; evaluate, report, save `final/`. Or, when asked to
        stop, save and stop. The exit code."""
        if self.is_main and not self.folder.architecture.exists():  # for whoever reads its checkpoints as models
            with atomic_folder(self.folder.architecture) as path:
                self.recipe.architecture.save_pretrained(path)
                self.recipe.tokenizer.save_pretrained(path)
        self.context.log(f"{self.config.name} in {self.folder.path}\n\n{self.recipe.describe()}\n")
        self.learner.model.train()
        watching = self._jit.watching(self._record_for_the_dead) if self._jit else nullcontext()
        with self.context.line.begin(self.step), watching:
            self._evaluate_if_due()  # a rank that died took it along
            while self.step < self.config.steps and self.recipe.ending is None:
                self.take_step()
                if self.recipe.ending is None:
                    self._evaluate_if_due()
                    stopping = self.stop.agreed()
                    if self.checkpointer.due(self.step) or stopping:
                        self.save(synchronous=stopping)
                    if stopping:
                        return self._end_interrupted()
        self.save(synchronous=True)
        return self._finish()

    def take_step(self) -> None:
        """One update, its records and what is remembered of it."""
        begin = time.perf_counter()
        try:
            done = self.recipe.step(self.step + 1)
        except DataError:  # on all ranks, which read the same
            self.save(synchronous=True)
            raise
        if done is None:
            return
        seconds = time.perf_counter() - begin
        self.step, self.tokens = self.step + 1, self.tokens + done.tokens
        self.ledger.step(self.step, seconds, data_wait=done.data_wait)
        speed = {"tokens_per_second": done.tokens / seconds, "seconds": seconds}
        self._record({"step": self.step, "tokens": self.tokens, **done.metrics, **speed}, self.recipe.exact)
        if self._jit is not None:
            self._jit.completed(self.step)
        self.context.line.update(self.step, self.tokens, done.metrics["loss"], done.note)
        self.recipe.show(self.step)

    def save(self, *, synchronous: bool = False) -> float:
        """Save a checkpoint; the seconds for which that held up the run. Collective."""
        if self._metrics is not None:
            self._metrics.synchronise()
        with self.ledger.span(CHECKPOINT):
            return self.checkpointer.save(self.step, self.state(), synchronous=synchronous)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            **self.learner.state(),
            **self.recipe.state(),
            "random": PerRank(RandomState()),
            "progress": {"step": self.step, "tokens": self.tokens, **self.recipe.progress()},
        }

    # ------------------------------------------------------------------------------------------- begin and resume

    def _check_room(self) -> None:
        """UsageError, before anything is computed, if a first checkpoint and a second one beside it do not fit."""
        if self.context.resuming:
            return
        size = 3 * sum(p.numel() * p.element_size() for p in self.learner.model.parameters())  # and AdamW's moments
        free = shutil.disk_usage(self.folder.path).free
        if free < 2 * size:
            raise UsageError(
                f"{self.folder.path}: {free / 1e9:,.1f} GB are free, and two checkpoints, one written beside the "
                f"other, take {2 * size / 1e9:,.1f} GB; free some, or name another output_dir"
            )

    def _resume(self) -> None:
        """Load the newest good checkpoint, if there is one, and open the logs."""
        state = self.state()
        step = self.checkpointer.load_latest(state) or 0
        if self.context.resuming and not step:
            raise RunError(f"{self.folder.checkpoints}: the checkpoints have gone while the run was starting; rerun")
        other_ranks = self.checkpointer.loaded_world not in (None, self.context.ranks)
        self.step, self.tokens = step, state["progress"]["tokens"]
        self.recipe.load_progress(state["progress"])
        recorded = max((r["step"] for r in read_records(self.folder.metrics)), default=0)
        if other_ranks and self.recipe.draws_by_rank and recorded > step:
            raise UsageError(
                f"{self.folder.path}: was struck at step {recorded}, and what it did since the checkpoint of step "
                f"{step} only {self.checkpointer.loaded_world} ranks can do again: go on with --nproc "
                f"{self.checkpointer.loaded_world}, and once more when that has saved with any number"
            )
        if self.is_main:
            # Another number of ranks adds in another order. Of rows at once too, and where the balance loss takes
            # running counts (§2.1) they are others.
            tolerance = 1e-2 if self.folder.rounds_otherwise(self.config) else 1e-3 if other_ranks else 0.0
            self._metrics = MetricsLog(self.folder.metrics, tolerance=tolerance)
        if self.config.tracking.trackers:
            about = {"name": self.config.name, "seed": self.config.seed}
            try:
                self.context.accelerator.init_trackers(self.config.name, config=about)
            except Exception as error:  # no account, no network
                raise UsageError(
                    f"tracking.trackers: cannot start: {one_line(error)}; mend that, or remove it"
                ) from None
        if step:
            checkpoint = step_folder(self.folder.checkpoints, step)
            self._parents, self._earlier_code = resuming_from(checkpoint, self._parents)
            self.context.log(f"going on after step {step}")

    # ------------------------------------------------------------------------------------------------ in the loop

    def _evaluate_if_due(self) -> None:
        every = self.recipe.evaluate_every
        first = self.step == 0 and self.recipe.evaluate_first
        due = every is not None and self.step % every == 0 and (first or 0 < self.step < self.config.steps)
        if due and self.step not in self._evaluated:
            self._evaluate(last=False)
            self._evaluated.add(self.step)

    def _evaluate(self, *, last: bool) -> bool:
        """Whether it came to its end."""
        metrics = self.recipe.evaluate(self.step, last=last)
        if metrics:
            record = {"kind": "evaluation", "step": self.step, "tokens": self.tokens, **metrics}
            self._record(record, self.recipe.exact_evaluation)
        return metrics is not None

    def _record(self, record: Record, exact: tuple[str, ...]) -> None:
        """To metrics.jsonl and the trackers; `exact` fields must come out alike when a step is computed again."""
        self._last_record = record
        if self._metrics is not None:
            self._metrics.append(record, exact=exact)
        numbers: dict[str, Any] = {k: v for k, v in record.items() if isinstance(v, int | float)}
        self._for_trackers(lambda tracker: tracker.log(numbers, step=record["step"]))

    def _for_trackers(self, act: Callable[[Any], object]) -> None:
        """No tracker costs a step: one that fails is told of, and left out from then on."""
        trackers = self.context.accelerator.trackers
        for tracker in list(trackers):
            try:
                act(tracker)
            except Exception as error:  # of the network, of another library's service: anything
                trackers.remove(tracker)
                failed = f"tracking.trackers: {tracker.name} failed and is left out from now on"
                self.context.log(f"{failed}: {one_line(error) or type(error).__name__}")

    def _record_for_the_dead(self, step: int) -> None:
        """Rank 0 may have died between an update and its record: write what it would have written of `step`."""
        record = self._last_record
        if record is not None and record["step"] == step:
            exact = self.recipe.exact_evaluation if "kind" in record else self.recipe.exact
            with closing(MetricsLog(self.folder.metrics)) as log:
                log.append(record, exact=exact)

    # -------------------------------------------------------------------------------------------------------- end

    def _finish(self) -> int:
        """Evaluate, report, and save the model folder last of all: a run with this folder is finished."""
        if not self._evaluate(last=True):
            return self._end_interrupted()
        ending = self.recipe.ending or Ending("")
        self._record_traces()
        self.recipe.report()
        if self.is_main:
            shutil.rmtree(self.folder.ranks, ignore_errors=True)
            if ending.exit_code == 0:
                record = partial(record_model, **self._origin(), steps=self.step)
                last = step_folder(self.folder.checkpoints, self.step)
                save_model(last, self.recipe.tokenizer, self.folder.final, record)
                self.context.log(f"\nmodel in {self.folder.final}, report in {self.folder.report}/summary.md")
        self.context.accelerator.wait_for_everyone()
        if ending.reason:
            self.context.log(ending.reason)
        self.ledger.end(ending.how)
        return ending.exit_code

    def _end_interrupted(self) -> int:
        """Stopped on request; all is saved."""
        self._record_traces()  # whoever gives the run up here can still learn from them
        self.context.log(f"stopped after step {self.step}, which is saved; the same command goes on with it")
        self.ledger.end("interrupted")
        return EXIT_INTERRUPTED

    def _record_traces(self) -> None:
        """Say where the run's traces come from, when all ranks have written theirs."""
        if self.recipe.traces is not None:
            self.context.accelerator.wait_for_everyone()
            if self.is_main:
                origin = self._origin()
                (parent,) = origin.pop("parents")
                record_traces(self.recipe.traces, parent=parent, **origin, steps=self.step)

    def _origin(self) -> dict[str, Any]:
        """What the records of this run's checkpoints, traces and model have in common."""
        return {
            "parents": self._parents,
            "config": self.folder.config,
            "data": self.recipe.data,
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
        self._for_trackers(lambda tracker: tracker.finish())
