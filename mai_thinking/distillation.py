"""Self-distillation (MAI-Thinking-1 report §3.1.4): SFT of a base or mid-trained model on traces of former climbs.

It recovers a climb that collapsed, moves what was learned to a new base or into another chat format, leaves reward
hacks behind, and makes several specialists one model (§3.5). The traces are there already; nothing is generated.
"""

import functools
import time
from contextlib import ExitStack
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerFast

from mai_thinking.config.data import TokenizerSection
from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.storage import atomic_file
from mai_thinking.data import PreparedData, prepare
from mai_thinking.data.tokenizer import load_tokenizer
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.provenance.lineage import require_own
from mai_thinking.rl.policy_model import policy_model
from mai_thinking.trace_packing import Batch, Batches, epochs
from mai_thinking.trace_selection import Selection, select, trace_folder
from mai_thinking.training.learner import Learner
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model_config
from mai_thinking.training.plan import Plan, quantity
from mai_thinking.training.report import draw_loss, pyplot
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.session import Session, run_in_folder
from mai_thinking.training.state import PerRank, RandomState
from mai_thinking.training.text_loss import TextLoss


def self_distill(config: DistillConfig, *, dry_run: bool = False) -> int:
    """Run `config`, or go on with it where it was; returns the exit code. `dry_run` prints what it chooses and costs,
    and stops."""
    if dry_run:
        architecture = student_config(config)
        print(describe(config, architecture, select(config, load_tokenizer(config.init_from))))
        return 0
    return run_in_folder(config, functools.partial(SelfDistillation, config))


def student_config(config: DistillConfig) -> MaiThinkingConfig:
    """The architecture of `init_from` with this run's dropout; packed traces do not see each other."""
    architecture = load_model_config(config.init_from)
    architecture.dropout = config.dropout
    architecture.document_masking = True
    architecture.max_position_embeddings = max(architecture.max_position_embeddings, config.batch.context_length)
    for number, source in enumerate(config.traces):
        trace_folder(source, f"traces.{number}")
    return architecture


class SelfDistillation:
    """One run in progress: its parts, built in the order in which they depend on each other."""

    def __init__(self, config: DistillConfig, folder: RunFolder, accelerator: Accelerator, stack: ExitStack) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        self.architecture = student_config(config)
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(config.init_from)
        traces = [
            require_own(trace_folder(source, f"traces.{number}"), allow_third_party=config.allow_third_party)
            for number, source in enumerate(config.traces)
        ]
        self.selection = select(config, self.tokenizer)
        text = self._prepare_text()
        self.batches = Batches(self.selection, text, config, rank=rank, ranks=ranks)
        model, parent = policy_model(config, self.architecture)
        self.session = Session(config, folder, accelerator, stack, parent=parent, data=text or (), traces=traces)
        self.learner = Learner(
            model, config, accelerator, balance=config.balance, z=self.architecture.router_z_loss_coef
        )
        # From here on random numbers are drawn by dropout alone; every rank has its own.
        set_seed(config.seed + 1_000_003 * (1 + rank))
        self.progress = {"step": 0, "tokens": 0, "traces": 0}
        state = self._state()
        self.step = self.session.resume(state)
        self.progress = state["progress"]

    def run(self) -> int:
        """Train to the last step, write the report, save `final/`. Or, when asked to stop, save and stop."""
        session = self.session
        session.save_architecture(self.architecture, self.tokenizer)
        session.say(f"{self.config.name} in {self.folder.path}\n")
        session.say(describe(self.config, self.architecture, self.selection) + "\n")
        self.learner.model.train()
        with session.line:
            while self.step < self.config.steps:
                self._one_step()
                if session.stop_after(self.step, self._state):
                    return session.end_interrupted(self.step)
        session.save(self.step, self._state(), synchronous=True)
        self._finish()
        session.ledger.end("done")
        return 0

    def _one_step(self) -> None:
        begin = time.perf_counter()
        batch = next(self.batches)
        made = time.perf_counter()
        step = self.step + 1
        metrics = self.learner.update(batch.micro_batches, TextLoss(), step)
        seconds = time.perf_counter() - begin
        self.step = step
        self.progress = {
            "step": step,
            "tokens": self.progress["tokens"] + self.config.batch.tokens_per_step,
            "traces": self.progress["traces"] + batch.traces,
        }
        self.session.ledger.step(step, seconds, data_wait=made - begin)
        self._record(batch, metrics, seconds)

    def _record(self, batch: Batch, metrics: dict[str, Any], seconds: float) -> None:
        tokens = self.progress["tokens"]
        record = {
            "step": self.step,
            "tokens": tokens,
            **metrics,
            "traces": self.progress["traces"],
            "response_tokens": batch.response_tokens,
            "text_rows": batch.text_rows,
            "tokens_per_second": self.config.batch.tokens_per_step / seconds,
            "seconds": seconds,
        }
        self.session.record(record, exact=("loss", "grad_norm", "traces"))
        self.session.line.update(self.step, tokens, metrics["loss"], f"{self.progress['traces']:,} traces")

    def _state(self) -> dict[str, Any]:
        return {
            **self.learner.state(),
            "batches": self.batches,
            "random": PerRank(RandomState()),
            "progress": self.progress,
            "ledger": self.session.ledger,
        }

    def _prepare_text(self) -> PreparedData | None:
        """What is mixed in, in the tokens of `init_from`."""
        section = self.config.text
        if section is None:
            return None
        tokenizer = TokenizerSection(path=self.config.init_from)
        return prepare(section.data.model_copy(update={"tokenizer": tokenizer}), log=self._say)

    def _say(self, text: str) -> None:
        if self.accelerator.process_index == 0:
            print(text, flush=True)

    def _finish(self) -> None:
        model = self.learner.unwrap()
        if self.session.rank == 0:
            write_report(self.folder, self.config, self.architecture, self.selection)
            self.session.save_final(model, self.tokenizer, self.step)
        self.accelerator.wait_for_everyone()


def describe(config: DistillConfig, architecture: MaiThinkingConfig, selection: Selection) -> str:
    """What the run costs, what the rules leave, and how often it is seen."""
    share = config.text.share if config.text else 0.0
    places = config.steps * config.batch.tokens_per_step
    shares, sources = selection.shares, selection.sources
    mean_places = sum(part * s.places / len(s.examples) for part, s in zip(shares, sources, strict=True))
    mean_tokens = sum(part * s.response_tokens / len(s.examples) for part, s in zip(shares, sources, strict=True))
    samples = places * (1 - share) / mean_places
    seen = ", ".join(
        f"{epochs(source, part, samples):.2f} of {source.run}" for part, source in zip(shares, sources, strict=True)
    )
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
    lines = [Plan.of(config, architecture).text(), *(f"{name:<12}  {value}" for name, value in rows)]
    return "\n".join(lines) + "\n\n" + selection.markdown()


def write_report(
    folder: RunFolder, config: DistillConfig, architecture: MaiThinkingConfig, selection: Selection
) -> None:
    """`report/summary.md`, and with the `plots` extra `loss.png`."""
    folder.report.mkdir(exist_ok=True)
    plan, _, table = describe(config, architecture, selection).partition("\n\n")
    steps = [record for record in read_records(folder.metrics) if "kind" not in record]
    page = [f"# {config.name}", f"From `{config.init_from}`.", f"```\n{plan}\n```", f"## Traces\n\n{table}"]
    page.append(f"Loss {steps[0]['loss']:.4f} at the first step, {steps[-1]['loss']:.4f} at the last.")
    if (plt := pyplot()) is not None:
        draw_loss(plt, folder.report / "loss.png", steps)
        page.append("![loss](loss.png)")
    with atomic_file(folder.report / "summary.md") as path:
        path.write_text("\n\n".join(page) + "\n")
