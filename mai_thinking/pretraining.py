"""The pre-training and mid-training loop (MAI-Thinking-1 report §2.4): text in, a Hugging Face folder out.

Mid-training is the same loop with `init_from`, another context and another mixture.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed

from mai_thinking.config.command import EXIT_INTERRUPTED
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import Loader, PreparedData, Step, prepare
from mai_thinking.lineage import CodeVersion, Lineage, going_on_from, record_checkpoint, record_model
from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from mai_thinking.training.checkpoint import Checkpointer
from mai_thinking.training.checkpoint_storage import step_folder
from mai_thinking.training.evaluation import Likelihood, evaluate_texts, summarize
from mai_thinking.training.goodput import CHECKPOINT, EVALUATION, GoodputLedger
from mai_thinking.training.metrics import MetricsLog
from mai_thinking.training.model_files import build_model, model_config, save_model, starting_point
from mai_thinking.training.optimizer import build_optimizer, learning_rate
from mai_thinking.training.parallel import share
from mai_thinking.training.plan import Plan
from mai_thinking.training.progress import ProgressLine
from mai_thinking.training.report import write_report
from mai_thinking.training.run_folder import RunFolder, atomic_folder
from mai_thinking.training.sampling import sample_text
from mai_thinking.training.state import ModelState, OptimizerState, PerRank, RandomState
from mai_thinking.training.step import StepResult, TrainStep
from mai_thinking.training.worker import StopRequest


def pretrain(config: PretrainConfig, *, dry_run: bool = False) -> int:
    """Run `config`, or go on with it where it was; returns the exit code. `dry_run` prints what it costs and stops."""
    architecture = model_config(config)
    if dry_run:
        print(Plan.of(config, architecture).text())
        return 0
    folder = RunFolder(config.folder)
    folder.check(config)
    if folder.finished:
        print(f"{folder.path} is finished: see {folder.report}/summary.md. Another name or seed makes another run.")
        return 0
    accelerator = make_accelerator(config, folder)
    with ExitStack() as stack:
        run = Pretraining(config, folder, accelerator, stack)
        stack.callback(run.close)
        return run.run()


def make_accelerator(config: PretrainConfig, folder: RunFolder) -> Accelerator:
    """Device, ranks, precision and trackers, as the config and the launcher say."""
    precision = config.execution.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "fp32"
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(config.tracking.trackers) or None,
        project_dir=str(folder.path / "trackers"),
        step_scheduler_with_optimizer=False,
    )


class Pretraining:
    """One run in progress: its parts, built in the order in which they depend on each other.

    The folder is claimed, on `stack`, only when all that can be wrong with the config has been seen: whoever corrects
    a mistake finds no folder that belongs to it.
    """

    def __init__(self, config: PretrainConfig, folder: RunFolder, accelerator: Accelerator, stack: ExitStack) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.data: PreparedData = prepare(config.data, say=self._say)
        self.architecture: MaiThinkingConfig = model_config(config, self.data.tokenizer)
        self.parents: list[Lineage] = [starting_point(config, self.architecture)]
        self.earlier_code: tuple[CodeVersion, ...] = ()
        model = build_model(config, self.architecture)
        if config.execution.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.execution.compile:
            model.compile()
        self.loader = Loader(
            self.data,
            context_length=config.batch.context_length,
            micro_batch_size=config.batch.micro_batch_size,
            rows_per_step=config.batch.global_batch_size,
            rank=self.rank,
            world_size=self.ranks,
            seed=config.seed,
        )
        if self.rank == 0:
            stack.enter_context(folder.claim(config))
        self.ledger = GoodputLedger(folder.events, enabled=self.rank == 0)
        self.stop = StopRequest()
        self.parallel = share(model, accelerator, config.execution.parallel)
        self.optimizer = build_optimizer(self.parallel.model, config.optimizer)
        self.train_step = TrainStep(
            self.parallel,
            self.optimizer,
            clip_norm=config.optimizer.clip_norm,
            balance=self.architecture.router_aux_loss_coef,
            z=self.architecture.router_z_loss_coef,
            exact_balance=config.execution.activation_checkpointing,
        )
        # From here on random numbers are drawn by dropout alone; every rank has its own. Python's and NumPy's too, for
        # whoever adds something that draws from them.
        set_seed(config.seed + 1_000_003 * (1 + self.rank))
        self.checkpointer = Checkpointer(
            folder.checkpoints, config.checkpoint, seal=lambda path: record_checkpoint(path, **self._origin())
        )
        self.progress = {"step": 0, "tokens": 0}
        self.step = self._resume()
        # Another number of ranks adds in another order.
        same_ranks = self.checkpointer.loaded_world in (None, self.ranks)
        self.metrics = MetricsLog(folder.metrics, tolerance=0.0 if same_ranks else 1e-3) if self.rank == 0 else None
        self.documents = MetricsLog(folder.documents(self.rank, self.ranks)) if config.tracking.documents else None
        self.line = ProgressLine(config.steps, done=self.step, every=config.tracking.print_every, show=self.rank == 0)
        if config.tracking.trackers:
            accelerator.init_trackers(config.name, config={"name": config.name, "seed": config.seed})

    def run(self) -> int:
        """Train to the last step, evaluate, save `final/`, write the report. Or, when asked to stop, save and stop."""
        self._announce()
        self._save_architecture()
        self.parallel.model.train()
        with self.line:
            for batch in self.loader:
                if self.step >= self.config.steps:
                    break
                self._train(batch)
                if self.step % self.config.evaluation.every == 0 and self.step < self.config.steps:
                    self._evaluate(self.config.evaluation.max_bytes)
                stopping = self.stop.agreed()
                if self.checkpointer.due(self.step) or stopping:
                    self._save(synchronous=stopping)
                if stopping:
                    self.line.say(f"stopped after step {self.step}, which is saved; the same command goes on with it")
                    self.ledger.end("interrupted")
                    return EXIT_INTERRUPTED
        self._save(synchronous=True)
        self._finish()
        self.ledger.end("done")
        return 0

    def close(self) -> None:
        """Leave no thread and no half-written file behind."""
        self.stop.close()
        self.loader.close()
        self.checkpointer.close()
        for log in (self.metrics, self.documents):
            if log is not None:
                log.close()
        if self.config.tracking.trackers:
            self.accelerator.end_training()

    # ----------------------------------------------------------------------------------------------- one step

    def _train(self, batch: Step) -> None:
        begin = time.perf_counter()
        step = self.step + 1
        rate = learning_rate(step, self.config.steps, self.config.optimizer.learning_rate, self.config.schedule)
        result = self.train_step(batch.micro_batches, rate, step)
        seconds = time.perf_counter() - begin + self.loader.wait_seconds
        self.step = step
        self.progress = {"step": step, "tokens": self.progress["tokens"] + self.config.batch.tokens_per_step}
        self.ledger.step(step, seconds, data_wait=self.loader.wait_seconds)
        self._record(result, rate, seconds)
        if self.documents is not None:
            self.documents.append({"step": step, "documents": batch.document_ids}, exact=("documents",))

    def _record(self, result: StepResult, rate: float, seconds: float) -> None:
        tokens = self.progress["tokens"]
        record = {
            "step": self.step,
            "tokens": tokens,
            "loss": result.loss,
            "balance_loss": result.balance_loss,
            "router_z_loss": result.router_z_loss,
            "grad_norm": result.grad_norm,
            "lr": rate,
            **result.routing,
            "tokens_per_second": self.config.batch.tokens_per_step / seconds,
            "data_wait": self.loader.wait_seconds,
            "seconds": seconds,
        }
        if self.metrics is not None:
            self.metrics.append(record)
        self._track(record)
        self.line.update(self.step, tokens, result.loss, f"violation {result.routing['violation_max']:.2f}")

    def _track(self, record: dict[str, Any]) -> None:
        if self.config.tracking.trackers:
            numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers, step=self.step)

    # ------------------------------------------------------------------------------------ evaluation, checkpoints

    def _evaluate(self, max_bytes: int | None) -> dict[str, Any]:
        """Held-out likelihood by category, each rank its share of the documents."""
        with self.ledger.span(EVALUATION), self.accelerator.autocast():
            model = self.parallel.whole()
            results = {
                category: self._likelihood(model, _first_bytes([d.text for d in documents], max_bytes))
                for category, documents in self.data.held_out.items()
                if documents
            }
        record = {"kind": "evaluation", "step": self.step, "tokens": self.progress["tokens"], **summarize(results)}
        if self.metrics is not None:
            self.metrics.append(record, exact=("bits_per_byte",))
        self._track(record)
        self.line.say(f"step {self.step}: held-out bits per byte {_spell_bits(record)}")
        return record

    def _likelihood(self, model: MaiThinkingForCausalLM, texts: Sequence[str]) -> Likelihood:
        mine = evaluate_texts(
            model,
            self.data.tokenizer,
            texts[self.rank :: self.ranks],
            context_length=self.config.batch.context_length,
            batch_size=self.config.evaluation.batch_size,
        )
        if self.ranks == 1:
            return mine
        sums = torch.tensor([mine.nats, mine.tokens, mine.bytes], dtype=torch.float64, device=self.accelerator.device)
        dist.all_reduce(sums)
        nats, tokens, size = sums.tolist()
        return Likelihood(nats, round(tokens), round(size))

    def _state(self) -> dict[str, Any]:
        return {
            "model": ModelState(self.parallel.model),
            "optimizer": OptimizerState(self.parallel.model, self.optimizer),
            "loader": self.loader,
            "random": PerRank(RandomState()),
            "progress": self.progress,
            "ledger": self.ledger,
        }

    def _resume(self) -> int:
        state = self._state()
        step = self.checkpointer.load_latest(state) or 0
        self.progress = state["progress"]
        if step:
            self.parents, self.earlier_code = going_on_from(step_folder(self.folder.checkpoints, step), self.parents)
            self._say(f"going on after step {step}")
        return step

    def _save(self, *, synchronous: bool = False) -> None:
        if self.metrics is not None:
            self.metrics.synchronise()
        with self.ledger.span(CHECKPOINT):
            self.checkpointer.save(self.step, self._state(), synchronous=synchronous)

    # --------------------------------------------------------------------------------------------- begin and end

    def _save_architecture(self) -> None:
        if self.rank == 0 and not self.folder.architecture.exists():
            with atomic_folder(self.folder.architecture) as path:
                self.architecture.save_pretrained(path)
                self.data.tokenizer.save_pretrained(path)

    def _announce(self) -> None:
        table = self.data.mixture_table(self.config.steps * self.config.batch.tokens_per_step)
        self.line.say(f"{self.config.name} in {self.folder.path}\n\n{Plan.of(self.config, self.architecture).text()}\n")
        self.line.say(table.markdown() + "\n")

    def _finish(self) -> None:
        """Evaluate on all held-out text, save the model folder, write the report, show what the model says."""
        evaluation = self._evaluate(None)
        model = self.parallel.whole()
        if self.rank == 0:
            samples = self._samples(model)
            write_report(self.folder, self.config, self.architecture, self.data, evaluation, samples)
            for prompt, text in samples.items():
                self.line.say(f"\n── {prompt!r}\n{prompt}{text}")
            # Last, since a run with this folder is finished.
            save_model(
                model,
                self.data.tokenizer,
                self.folder.final,
                lambda path: record_model(path, **self._origin(), steps=self.step),
            )
            self.line.say(f"\nmodel in {self.folder.final}, report in {self.folder.report}/summary.md")
        self.accelerator.wait_for_everyone()

    def _origin(self) -> dict[str, Any]:
        """What the records of this run's checkpoints and its model have in common."""
        return {
            "parents": self.parents,
            "config": self.folder.config,
            "data": self.data,
            "seed": self.config.seed,
            "code": self.earlier_code,
        }

    def _samples(self, model: MaiThinkingForCausalLM) -> dict[str, str]:
        evaluation = self.config.evaluation
        return {
            prompt: sample_text(
                model, self.data.tokenizer, prompt, tokens=evaluation.sample_tokens, seed=self.config.seed
            )
            for prompt in evaluation.sample_prompts
        }

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def _first_bytes(texts: Sequence[str], limit: int | None) -> list[str]:
    """Whole texts from the front until `limit` bytes are reached; at least one."""
    taken: list[str] = []
    size = 0
    for text in texts:
        size += len(text.encode())
        if limit is not None and size > limit and taken:
            break
        taken.append(text)
    return taken


def _spell_bits(record: dict[str, Any]) -> str:
    prefix = "bits_per_byte/"
    parts = [f"{name.removeprefix(prefix)} {value:.3f}" for name, value in record.items() if name.startswith(prefix)]
    return f"{', '.join(parts)}; weighted {record['bits_per_byte']:.3f}"
