"""Pre-training and mid-training (MAI-Thinking-1 report §2): text in, a Hugging Face folder out.

Mid-training is the same with `init_from`, another context and another mixture.
"""

import itertools
import textwrap
from typing import Any

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import Loader, PreparedData, prepare
from mai_thinking.data.accounting import left_out_table
from mai_thinking.training.context import RunContext
from mai_thinking.training.evaluation import BYTES_PER_TRAINED_TOKEN, HeldOutEvaluation, compressors
from mai_thinking.training.learner import Learner, TextLoss
from mai_thinking.training.ledger import EVALUATION
from mai_thinking.training.metrics import MetricsLog
from mai_thinking.training.model_files import build_model, fill_model, model_config, starting_point
from mai_thinking.training.parallel import divides
from mai_thinking.training.plan import plan_text
from mai_thinking.training.sampling import Glance, sample_text, share_parsed
from mai_thinking.training.trainer import Recipe, Step, run_recipe


def pretrain(config: PretrainConfig, *, dry_run: bool = False) -> int:
    """Run `config`, or go on with it where it was; returns the exit code. `dry_run` prints what it costs and stops."""
    architecture = model_config(config)
    if dry_run:
        print(plan_text(config, architecture))
        return 0
    return run_recipe(config, PretrainRecipe)


def make_loader(config: PretrainConfig, data: PreparedData, rank: int = 0, ranks: int = 1) -> Loader:
    """The run's batches, or one rank's part of them; a context, which ends its thread."""
    batch = config.batch
    return Loader(
        data,
        context_length=batch.context_length,
        micro_batch_size=min(batch.micro_batch_size, max(1, batch.global_batch_size // ranks)),
        rows_per_step=batch.global_batch_size,
        rank=rank,
        world_size=ranks,
        seed=config.seed,
    )


FUNCTIONS, FUNCTION_TOKENS = 32, 48
"""So many functions a model writes at an evaluation, of which the share is told that parses."""
WRITTEN = 4
"""Trained tokens that take no less time than one that is written, in nano on a CPU."""


class PretrainRecipe(Recipe):
    """Documents → packed rows → cross-entropy and router losses → update; likelihood of held-out text."""

    data: PreparedData
    exact_evaluation = ("bits_per_byte",)

    def __init__(self, config: PretrainConfig, context: RunContext) -> None:
        self.config, self.context = config, context
        self.data = prepare(config.data, log=context.log)
        self.tokenizer = self.data.tokenizer
        self.architecture = model_config(config, self.tokenizer)
        self.parents = [starting_point(config, self.architecture)]
        divided = divides(config.execution, context.ranks)
        model = build_model(config, self.architecture, skip_init=context.resuming, on_meta=divided)
        self.loader = context.stack.enter_context(make_loader(config, self.data, context.rank, context.ranks))
        self.loss = TextLoss()
        self.learner = Learner(
            model,
            config,
            context.accelerator,
            balance=self.architecture.router_aux_loss_coef,
            z=self.architecture.router_z_loss_coef,
        )
        if divided and not context.resuming:
            fill_model(self.learner.unwrap(), config)
        self.evaluate_every = config.evaluation.every
        size = sum(document.size for documents in self.data.held_out.values() for document in documents)
        context.line.after_last = size / BYTES_PER_TRAINED_TOKEN / config.batch.tokens_per_step
        self.held_out = HeldOutEvaluation(self.data, config, context, self.learner)
        self._documents: MetricsLog | None = None
        # A run that goes on has been seen; one that is killed every minute must not look at itself every minute.
        self._glance = Glance(600 if context.resuming else 10)
        self._prompts = itertools.cycle(config.evaluation.sample_prompts)

    def describe(self) -> str:
        """What it costs, and what it reads how often."""
        mixture = self.data.mixture(self.config.steps * self.config.batch.tokens_per_step)
        return f"{plan_text(self.config, self.architecture)}\n\n{mixture.markdown()}\n"

    def state(self) -> dict[str, Any]:
        """The place in the data."""
        return {"loader": self.loader}

    def step(self, step: int) -> Step:
        """Read a global batch, learn from it."""
        batch = next(self.loader)
        if self.config.tracking.documents:
            self._note_documents(step, batch.document_ids)
        metrics = self.learner.update(batch.micro_batches, self.loss, step)
        wait = self.loader.wait_seconds
        note = f"violation {metrics['violation_max']:.2f}"
        return Step({**metrics, "data_wait": wait}, self.config.batch.tokens_per_step, note, wait)

    def evaluate(self, step: int, *, last: bool) -> dict[str, Any] | None:
        """Held-out likelihood by category; at the end the report's normalised score and what is known by heart too, if
        the config asks for them."""
        metrics = self.held_out.evaluate(step, last=last)
        if metrics is not None:
            bits = [(name.rpartition("/")[2], metrics[name]) for name in metrics if name.startswith("bits_per_byte/")]
            told = ", ".join(f"{category} {value:.3f}" for category, value in bits)
            told = f"step {step}: held-out bits per byte {told}; weighted {metrics['bits_per_byte']:.3f}"
            between = self.config.evaluation.every * self.config.batch.tokens_per_step
            if self.data.held_out.get("code") and (last or 0.01 * between >= WRITTEN * FUNCTIONS * FUNCTION_TOKENS):
                with self.context.ledger.span(EVALUATION):
                    parsed = share_parsed(
                        self.learner.unwrap(), self.tokenizer, samples=FUNCTIONS, tokens=FUNCTION_TOKENS
                    )
                metrics["parsed"] = parsed
                told += f"; {round(parsed * FUNCTIONS)} of {FUNCTIONS} functions that it wrote parse"
            self.context.log(told)
        return metrics

    def show(self, step: int) -> None:
        """Step, loss, time left, and how the model goes on from the next of the sample prompts. Rank 0 alone can do
        that where it has the whole model."""
        silent = self.context.rank or self.learner.divided or not self.config.evaluation.sample_prompts
        if silent or not self._glance.due():
            return
        prompt = next(self._prompts)
        with self._glance.looking(), self.context.ledger.span(EVALUATION):
            text = sample_text(self.learner.unwrap(), self.tokenizer, prompt, tokens=40, seed=step)
        line = f"step {step}/{self.config.steps}  {self.context.line.text}"
        self.context.log(f"{line}; it writes\n{textwrap.indent(prompt + text, '  │ ', lambda _: True)}")

    def report(self) -> None:
        """For the page of results: plan, mixture, what `gzip -9` and `xz -9e` make of the held-out text, and what the
        model writes, on all ranks the same."""
        section, model = self.config.evaluation, self.learner.unwrap()
        samples = {
            prompt: sample_text(model, self.tokenizer, prompt, tokens=section.sample_tokens, seed=self.config.seed)
            for prompt in section.sample_prompts
        }
        if self.context.rank:
            return
        texts = {
            category: [d.text for d in documents] for category, documents in self.data.held_out.items() if documents
        }
        self.context.folder.note(
            plan=plan_text(self.config, self.architecture),
            mixture=self.data.mixture(self.config.steps * self.config.batch.tokens_per_step).records(),
            left_out=left_out_table([*self.data.left_out, *self.loader.left_out()]),
            compressors={category: compressors(found) for category, found in texts.items()},
            written=samples,
        )
        for prompt, text in samples.items():
            self.context.log(f"\n── {prompt!r}\n{prompt}{text}")

    def _note_documents(self, step: int, ids: list[list[str]]) -> None:
        if self._documents is None:  # the folder is this run's by now
            self._documents = MetricsLog(self.context.folder.documents(self.context.rank, self.context.ranks))
            self.context.stack.callback(self._documents.close)
        self._documents.append({"step": step, "documents": ids}, exact=("documents",))
