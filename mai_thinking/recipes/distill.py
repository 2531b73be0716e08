"""Self-distillation (MAI-Thinking-1 report §3.1.4): SFT of a base or mid-trained model on traces of former RL runs.

It recovers an RL run that collapsed, moves what was learned to a new base or into another chat format, leaves reward
hacks behind, and makes several specialists one model (§3.5). The traces are there already; nothing is generated.
"""

import time
from typing import Any

from mai_thinking.config.data import TokenizerSection
from mai_thinking.config.distillation import DistillConfig
from mai_thinking.data import prepare
from mai_thinking.data.tokenizer import load_tokenizer
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.rl.policy_model import policy_model
from mai_thinking.rl.trace_packing import TraceBatches
from mai_thinking.rl.trace_selection import Selection, own_traces, select, trace_folder
from mai_thinking.training.context import RunContext
from mai_thinking.training.learner import Learner, TextLoss
from mai_thinking.training.model_files import load_model_config
from mai_thinking.training.plan import plan_text, quantity
from mai_thinking.training.trainer import Recipe, Step, run_recipe


def self_distill(config: DistillConfig, *, dry_run: bool = False) -> int:
    """Run `config`, or go on with it where it was; returns the exit code. `dry_run` prints what it chooses and costs,
    and stops."""
    if dry_run:
        architecture = student_config(config)
        print(describe(config, architecture, select(config, load_tokenizer(config.init_from))))
        return 0
    return run_recipe(config, DistillRecipe)


def student_config(config: DistillConfig) -> MaiThinkingConfig:
    """The architecture of `init_from` with this run's dropout; packed traces do not see each other."""
    architecture = load_model_config(config.init_from)
    architecture.dropout = config.dropout
    architecture.document_masking = True
    architecture.max_position_embeddings = max(architecture.max_position_embeddings, config.batch.context_length)
    for number, source in enumerate(config.traces):
        trace_folder(source, f"traces.{number}")
    return architecture


class DistillRecipe(Recipe):
    """Chosen traces, and text between them → packed rows → cross-entropy of the responses → update."""

    exact = ("loss", "grad_norm", "traces")

    def __init__(self, config: DistillConfig, context: RunContext) -> None:
        self.config, self.context = config, context
        self.architecture = student_config(config)
        self.tokenizer = load_tokenizer(config.init_from)
        traces = [
            own_traces(trace_folder(source, f"traces.{number}"), allow_third_party=config.allow_third_party)
            for number, source in enumerate(config.traces)
        ]
        self.selection = select(config, self.tokenizer)
        text = None
        if config.text is not None:  # in the tokens of `init_from`
            tokenizer = TokenizerSection(path=config.init_from)
            text = prepare(config.text.data.model_copy(update={"tokenizer": tokenizer}), log=context.log)
        self.data = text or ()
        self.batches = TraceBatches(self.selection, text, config, rank=context.rank, ranks=context.ranks)
        model, parent = policy_model(config, self.architecture)
        self.parents = [parent, *traces]
        self.loss = TextLoss()
        self.learner = Learner(
            model, config, context.accelerator, balance=config.balance, z=self.architecture.router_z_loss_coef
        )

    def describe(self) -> str:
        """What it costs, and what the rules leave."""
        return describe(self.config, self.architecture, self.selection)

    def state(self) -> dict[str, Any]:
        """The place in the traces and the text."""
        return {"batches": self.batches}

    def step(self, step: int) -> Step:
        """Make a global batch, learn from it."""
        begin = time.perf_counter()
        batch = next(self.batches)
        made = time.perf_counter()
        seen = self.batches.traces_dealt
        metrics = self.learner.update(batch.micro_batches, self.loss, step)
        counts = {"traces": seen, "response_tokens": batch.response_tokens, "text_rows": batch.text_rows}
        return Step(metrics | counts, self.config.batch.tokens_per_step, f"{seen:,} traces", made - begin)

    def report(self) -> None:
        """For the page of results: the plan, and the traces that the rules left."""
        if self.context.rank:
            return
        plan, _, table = describe(self.config, self.architecture, self.selection).partition("\n\n")
        self.context.folder.note(plan=plan, traces=table)


def describe(config: DistillConfig, architecture: MaiThinkingConfig, selection: Selection) -> str:
    """What the run costs, what the rules leave, and how often it is seen."""
    share = config.text.share if config.text else 0.0
    places = config.steps * config.batch.tokens_per_step
    # How often an example of each source is seen, in one sample.
    parts = [
        (part / len(source.examples), source) for part, source in zip(selection.shares, selection.sources, strict=True)
    ]
    mean_places = sum(part * source.places for part, source in parts)
    mean_tokens = sum(part * source.response_tokens for part, source in parts)
    samples = places * (1 - share) / mean_places
    seen = ", ".join(f"{samples * part:.2f} of {source.run}" for part, source in parts)
    learned, text = samples * mean_tokens, places * share
    rows = [
        ("samples", f"about {quantity(samples)}: epochs {seen}"),
        ("learned", f"about {quantity(learned)} tokens of responses, one in {mean_places / mean_tokens:.1f} places"),
    ]
    if share:
        part = text / (learned + text)
        rows.append(
            ("text", f"{quantity(text)} tokens, {100 * share:g} % of the rows and {100 * part:.0f} % of the loss")
        )
    lines = [plan_text(config, architecture), *(f"{name:<12}  {value}" for name, value in rows)]
    return "\n".join(lines) + "\n\n" + selection.markdown()
