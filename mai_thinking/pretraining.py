"""The pre-training and mid-training loop (MAI-Thinking-1 report §2.4): text in, a Hugging Face folder out.

Mid-training is the same loop with `init_from`, another context and another mixture.
"""

import functools
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import Batch, Loader, PreparedData, prepare
from mai_thinking.errors import RunError
from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from mai_thinking.training.checkpoint_storage import visible_steps
from mai_thinking.training.evaluation import Likelihood, evaluate_texts, summarize
from mai_thinking.training.goodput import EVALUATION
from mai_thinking.training.learner import Learner
from mai_thinking.training.metrics import MetricsLog, read_records
from mai_thinking.training.model_files import build_model, model_config, starting_point
from mai_thinking.training.plan import Plan
from mai_thinking.training.report import write_report
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.sampling import sample_text
from mai_thinking.training.session import Session, run_in_folder
from mai_thinking.training.state import PerRank, RandomState
from mai_thinking.training.text_loss import TextLoss


def pretrain(config: PretrainConfig, *, dry_run: bool = False) -> int:
    """Run `config`, or go on with it where it was; returns the exit code. `dry_run` prints what it costs and stops."""
    architecture = model_config(config)
    if dry_run:
        print(Plan.of(config, architecture).text())
        return 0
    return run_in_folder(config, functools.partial(Pretraining, config))


class Pretraining:
    """One run in progress: its parts, built in the order in which they depend on each other."""

    def __init__(self, config: PretrainConfig, folder: RunFolder, accelerator: Accelerator, stack: ExitStack) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.data: PreparedData = prepare(config.data, log=self._say)
        self.architecture: MaiThinkingConfig = model_config(config, self.data.tokenizer)
        parent = starting_point(config, self.architecture)
        resuming = bool(visible_steps(folder.checkpoints))
        model = build_model(config, self.architecture, skip_init=resuming)
        self.loader = stack.enter_context(
            Loader(
                self.data,
                context_length=config.batch.context_length,
                micro_batch_size=min(
                    config.batch.micro_batch_size, max(1, config.batch.global_batch_size // self.ranks)
                ),
                rows_per_step=config.batch.global_batch_size,
                rank=self.rank,
                world_size=self.ranks,
                seed=config.seed,
            )
        )
        self.session = Session(config, folder, accelerator, stack, parent=parent, data=self.data)
        self.learner = Learner(
            model,
            config,
            accelerator,
            balance=self.architecture.router_aux_loss_coef,
            z=self.architecture.router_z_loss_coef,
        )
        # From here on random numbers are drawn by dropout alone; every rank has its own. Python's and NumPy's too, for
        # whoever adds something that draws from them.
        set_seed(config.seed + 1_000_003 * (1 + self.rank))
        self.progress = {"step": 0, "tokens": 0}
        state = self._state()
        self.step = self.session.resume(state)
        if resuming and not self.step:
            raise RunError(f"{folder.checkpoints}: the checkpoints have gone while the run was starting; rerun")
        self.progress = state["progress"]
        replicated = config.execution.parallel == "ddp"
        self.survivor = self.session.survivor(self.learner.optimizer, self._state) if replicated else None
        # Read before anybody writes to them, so that all ranks know the same.
        self.evaluations = {r["step"] for r in read_records(folder.metrics) if r.get("kind") == "evaluation"}
        self.evaluated = {
            part["kind"]: Likelihood(part["nats"], part["tokens"], part["bytes"])
            for part in read_records(folder.evaluations)
            if part["step"] == config.steps
        }
        self.documents = MetricsLog(folder.documents(self.rank, self.ranks)) if config.tracking.documents else None
        if self.documents is not None:
            stack.callback(self.documents.close)

    def run(self) -> int:
        """Train to the last step, evaluate, save `final/`, write the report. Or, when asked to stop, save and stop."""
        session = self.session
        self._announce()
        session.save_architecture(self.architecture, self.data.tokenizer)
        self.learner.model.train()
        surviving = self.survivor.watching(session.record_for_the_dead) if self.survivor else nullcontext()
        with session.line, surviving:
            self._evaluate_if_due()  # a rank that died took it along
            while self.step < self.config.steps:
                self._train(next(self.loader))
                self._evaluate_if_due()
                if session.stop_after(self.step, self._state):
                    return session.end_interrupted(self.step)
        session.save(self.step, self._state(), synchronous=True)
        if not self._finish():
            return session.end_interrupted(self.step)
        session.ledger.end("done")
        return 0

    # ----------------------------------------------------------------------------------------------- one step

    def _train(self, batch: Batch) -> None:
        begin = time.perf_counter()
        # All but the weights is as after the step before they are: a rank that is left alone saves it so (`survivor`).
        self.step += 1
        self.progress = {"step": self.step, "tokens": self.progress["tokens"] + self.config.batch.tokens_per_step}
        if self.documents is not None:
            self.documents.append({"step": self.step, "documents": batch.document_ids}, exact=("documents",))
        metrics = self.learner.update(batch.micro_batches, TextLoss(), self.step)
        seconds = time.perf_counter() - begin + self.loader.wait_seconds
        self.session.ledger.step(self.step, seconds, data_wait=self.loader.wait_seconds)
        self._record(metrics, seconds)

    def _record(self, metrics: dict[str, Any], seconds: float) -> None:
        tokens = self.progress["tokens"]
        record = {
            "step": self.step,
            "tokens": tokens,
            **metrics,
            "tokens_per_second": self.config.batch.tokens_per_step / seconds,
            "data_wait": self.loader.wait_seconds,
            "seconds": seconds,
        }
        self.session.record(record)
        self.session.line.update(self.step, tokens, metrics["loss"], f"violation {metrics['violation_max']:.2f}")

    # ------------------------------------------------------------------------------------ evaluation, checkpoints

    def _evaluate_if_due(self) -> None:
        due = 0 < self.step < self.config.steps and self.step % self.config.evaluation.every == 0
        if due and self.step not in self.evaluations:
            self._evaluate(self.config.evaluation.max_bytes)
            self.evaluations.add(self.step)

    def _evaluate(self, max_bytes: int | None) -> dict[str, Any]:
        """Held-out likelihood by category, each rank its share of the documents."""
        with self.session.ledger.span(EVALUATION), self.accelerator.autocast():
            model = self.learner.unwrap()
            results = {
                category: self._likelihood(model, _first_bytes([d.text for d in documents], max_bytes))
                for category, documents in self.data.held_out.items()
                if documents
            }
        return self._record_evaluation(results)

    def _evaluate_all(self) -> dict[str, Any] | None:
        """The same of all held-out text, category by category: it takes long enough to be struck by a fault or asked to
        stop, and then goes on with the category where it was. None if it was asked to stop."""
        model = self.learner.unwrap()
        results = {}
        for category, documents in self.data.held_out.items():
            if not documents:
                continue
            if self.session.stop.agreed():
                return None
            if category not in self.evaluated:
                with self.session.ledger.span(EVALUATION), self.accelerator.autocast():
                    result = self._likelihood(model, [document.text for document in documents])
                if self.rank == 0:
                    part = {"step": self.step, "kind": category, **asdict(result)}
                    with closing(MetricsLog(self.folder.evaluations)) as log:
                        log.append(part)
                self.evaluated[category] = result
            results[category] = self.evaluated[category]
        return self._record_evaluation(results)

    def _record_evaluation(self, results: dict[str, Likelihood]) -> dict[str, Any]:
        record = {"kind": "evaluation", "step": self.step, "tokens": self.progress["tokens"], **summarize(results)}
        self.session.record(record, exact=("bits_per_byte",))
        self.session.say(f"step {self.step}: held-out bits per byte {_spell_bits(record)}")
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
            **self.learner.state(),
            "loader": self.loader,
            "random": PerRank(RandomState()),
            "progress": self.progress,
            "ledger": self.session.ledger,
        }

    # --------------------------------------------------------------------------------------------- begin and end

    def _announce(self) -> None:
        table = self.data.mixture_table(self.config.steps * self.config.batch.tokens_per_step)
        self.session.say(
            f"{self.config.name} in {self.folder.path}\n\n{Plan.of(self.config, self.architecture).text()}\n"
        )
        self.session.say(table.markdown() + "\n")

    def _finish(self) -> bool:
        """Evaluate on all held-out text, save the model folder, write the report, show what the model says. False if it
        was asked to stop before that was done."""
        evaluation = self._evaluate_all()
        if evaluation is None:
            return False
        model = self.learner.unwrap()
        if self.rank == 0:
            samples = self._samples(model)
            write_report(self.folder, self.config, self.architecture, self.data, evaluation, samples)
            for prompt, text in samples.items():
                self.session.say(f"\n── {prompt!r}\n{prompt}{text}")
            self.session.save_final(model, self.data.tokenizer, self.step)
        self.accelerator.wait_for_everyone()
        return True

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
