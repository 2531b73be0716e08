"""The RL climb (MAI-Thinking-1 report §3): rollouts, rewards, gradient steps, from a base that has seen no reasoning.

One engine update is: weights go to the engine, the engine fills the buffer, `steps_per_update` gradient steps empty it.
Everything that decides what comes next is in a checkpoint, pending rollouts included; so a run that was killed anywhere
ends as the undisturbed one does, bit for bit.
"""

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed

from mai_thinking.config.command import EXIT_COLLAPSED
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.storage import atomic_file
from mai_thinking.config.tasks import TaskSection
from mai_thinking.data.tokenizer import load_tokenizer
from mai_thinking.errors import UsageError
from mai_thinking.provenance.lineage import Source, hash_file
from mai_thinking.rl.buffer import RolloutBuffer
from mai_thinking.rl.collapse import COLLAPSE, CollapseDetector, is_repetitive
from mai_thinking.rl.engine import BatchedEngine
from mai_thinking.rl.evaluation import HeldOut, one_of_each, samples_record
from mai_thinking.rl.grading import GradingPool
from mai_thinking.rl.length_curriculum import LengthCurriculum
from mai_thinking.rl.objective import Objective
from mai_thinking.rl.packing import pack
from mai_thinking.rl.policy_loss import PolicyLoss
from mai_thinking.rl.policy_model import check_lengths, describe, policy_config, policy_model
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.rewards import TERMS
from mai_thinking.rl.rollout import Group
from mai_thinking.rl.rollout_worker import Responder, RolloutWorker
from mai_thinking.rl.tasks import TaskMix
from mai_thinking.rl.template import Template
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.training.goodput import EVALUATION
from mai_thinking.training.learner import Learner
from mai_thinking.training.metrics import MetricsLog
from mai_thinking.training.model_files import load_model_config
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.session import Session, run_in_folder
from mai_thinking.training.state import PerRank, RandomState


def climb(config: GrpoConfig, *, dry_run: bool = False) -> int:
    """Run `config`, or go on with it where it was; returns the exit code. `dry_run` prints what it costs and stops."""
    if dry_run:
        print(describe(config))
        return 0
    if config.collapse.enabled and (config.folder / COLLAPSE).exists():
        RunFolder(config.folder).check(config)
        print(f"{config.folder} has collapsed: see its {COLLAPSE}. collapse.enabled=false goes on with it all the same")
        return EXIT_COLLAPSED
    return run_in_folder(config, functools.partial(Climb, config))


class Climb:
    """One climb in progress: its parts, built in the order in which they depend on each other."""

    def __init__(self, config: GrpoConfig, folder: RunFolder, accelerator: Accelerator, stack: ExitStack) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        if config.groups_per_step % ranks:
            raise UsageError(f"groups_per_step: {config.groups_per_step} groups cannot be divided over {ranks} ranks")
        mix = TaskMix(config.tasks, config.seed)
        self.architecture = policy_config(config)
        check_lengths(config, mix)
        self.tokenizer = load_tokenizer(config.init_from)
        model, lineage = policy_model(config, self.architecture)
        pool = stack.enter_context(
            GradingPool(
                config.tasks,
                workers=config.grading.workers,
                seconds=config.grading.seconds,
                megabytes=config.grading.megabytes,
            )
        )
        sources = [_source_of(task) for task in config.tasks]
        self.session = Session(config, folder, accelerator, stack, parent=lineage, data=sources)
        self.learner = Learner(model, config, accelerator, balance=config.balance)
        self.objective = Objective(config.objective)
        whole, template = self.learner.unwrap(), Template(config.template)
        self.engine = self._engine(whole)
        self.responder = Responder(self.engine, pool, template, self.tokenizer)
        self.held_out = HeldOut(mix, config.evaluation, rank=rank, ranks=ranks)
        self.curriculum = LengthCurriculum(config.curriculum)
        self.detector = CollapseDetector(config.collapse)
        self.solved = False
        self.buffer = RolloutBuffer()
        self.worker = RolloutWorker(
            config,
            mix,
            self.responder,
            TraceStore(folder.path / FOLDER, rank),
            rank=rank,
            ranks=ranks,
        )
        # Nothing draws from the global generators; whoever adds something that does has them seeded and saved.
        set_seed(config.seed + 1_000_003 * (1 + rank))
        self.progress = {"step": 0, "tokens": 0}
        state = self._state()
        self.step = self.session.resume(state)
        self.progress = {name: state["progress"][name] for name in self.progress}
        if history := state["progress"].get("collapse"):  # older checkpoints have none
            self.detector.load_state_dict(history)

    def run(self) -> int:
        """Climb to the last step, or until the tasks are solved, evaluate, save `final/`, write the report. Or, when
        asked to stop or collapsed, save and stop."""
        self.session.save_architecture(self.architecture, self.tokenizer)
        self.session.say(f"{self.config.name} in {self.folder.path}\n\n{describe(self.config)}\n")
        if dropout := load_model_config(self.config.init_from).dropout:
            self.session.say(f"the dropout of {dropout} in {self.config.init_from} is off here\n")
        self.learner.model.train()
        session = self.session
        with session.line:
            if self.step == 0:
                self._evaluate()
            while self.step < self.config.steps:
                if not self._collapsed:  # as a checkpoint may have it
                    self._one_step()
                if self.solved:
                    session.say(f"after step {self.step} hardly a problem is left to learn from: the tasks are solved")
                    break
                if self._collapsed:
                    return self._end_collapsed()
                if self.step % self.config.evaluation.every == 0 and self.step < self.config.steps:
                    self._evaluate()
                if session.stop_after(self.step, self._state):
                    if session.rank == 0:  # whoever gives up here can still learn from them
                        session.record_traces(self.folder.path / FOLDER, self.step)
                    return session.end_interrupted(self.step)
            session.save(self.step, self._state(), synchronous=True)
            self._finish()
        session.ledger.end("done")
        return 0

    # ----------------------------------------------------------------------------------------------- one step

    def _one_step(self) -> None:
        begin = time.perf_counter()
        dropped, counts = self._refill() if self.step % self.config.rollouts.steps_per_update == 0 else (0, None)
        if self._collapsed or self.solved:
            return
        generated = time.perf_counter()
        step = self.step + 1
        groups = self.buffer.take(self._groups_per_step)
        metrics = self._learn(groups, step)
        summary = self._summarize(groups)
        end = time.perf_counter()
        self.session.ledger.step(step, end - begin)
        self.step = step
        self.progress = {"step": step, "tokens": self.progress["tokens"] + summary.pop("tokens")}
        # Only from weights that are the engine's own is the difference a mismatch; later it is what was learned.
        fresh = (step - 1) % self.config.rollouts.steps_per_update == 0 and summary["staleness"] == 0
        mismatch = metrics.pop("mismatch")
        record = {
            "step": step,
            "tokens": self.progress["tokens"],
            **metrics,
            **({"mismatch": mismatch} if fresh else {}),
            **summary,
            "max_length": self.curriculum.max_length,
            **({"groups_stale": dropped, **counts.metrics()} if counts else {}),
            "tokens_per_second": summary["response_length"] * self._rollouts_per_step / (end - begin),
            "rollout_seconds": generated - begin,
            "seconds": end - begin,
        }
        self.session.record(record, exact=("loss", "grad_norm", "reward"))
        self.detector.update(record)
        if self.curriculum.update(*((counts.long, counts.rollouts) if counts else (0, 0))):
            self.session.say(f"step {step}: responses may be {self.curriculum.max_length} tokens long from here on")
        note = (
            f"pass rate {summary['pass_rate']:.2f}  entropy {metrics['entropy']:.2f}  k {metrics['clip_relaxation']:g}"
        )
        self.session.line.update(step, self.progress["tokens"], metrics["loss"], note)

    def _learn(self, groups: Sequence[Group], step: int) -> dict[str, Any]:
        """One gradient step on `groups`, and what the entropy control makes of its entropy."""
        experts, packing = self.architecture.num_experts, self.config.packing
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        rows = pack(rollouts, row_length=packing.row_length, rows=packing.rows, num_experts=experts)
        loss = PolicyLoss(self.objective, self.config.rollouts, [rollout.advantage for rollout in rollouts], experts)
        clip_relaxation = self.objective.clip_relaxation
        metrics = self.learner.update(rows, loss, step)
        if not loss.signal:
            self.session.say(f"step {step}: in each group all rewards are equal; the weights stay what they are")
        self.objective.after_step(metrics["entropy"])
        return {**metrics, "clip_relaxation": clip_relaxation}

    @property
    def _collapsed(self) -> bool:
        return self.config.collapse.enabled and self.detector.verdict is not None

    @property
    def _groups_per_step(self) -> int:
        """Of this rank."""
        return self.config.groups_per_step // self.session.ranks

    @property
    def _rollouts_per_step(self) -> int:
        """Of all ranks."""
        return self.config.groups_per_step * self.config.sampling.full_size

    def _refill(self) -> tuple[int, FilterCounts]:
        """Give the engine the learner's weights, and the buffer what the steps up to the next update take."""
        rollouts = self.config.rollouts
        version = self.step // rollouts.steps_per_update
        self.engine.update_weights(self.learner.unwrap())
        dropped = self.buffer.drop_stale(version - rollouts.max_staleness)
        wanted = self._groups_per_step * rollouts.steps_per_update * (1 + rollouts.lead)
        self.buffer.add(
            self.worker.collect(
                wanted - len(self.buffer),
                step=self.step,
                version=version,
                max_length=self.curriculum.max_length,
                penalise_length=self.curriculum.penalises_length,
                checkpoint=f"{self.config.name}/step-{self.step:08d}",
                beat=self.session.ledger.heartbeat,
                hopeless=lambda counts: self.config.collapse.enabled and self.detector.hopeless(counts),
            )
        )
        counts, missing = self._sum_counts(self.worker.take_counts(), max(0, wanted - len(self.buffer)))
        # A rank gives up because all is too easy, or too hard; what all of them drew tells which.
        if missing and counts.early_too_easy + counts.too_easy >= 9 * (counts.early_too_hard + counts.too_hard):
            self.solved = True
        elif missing:
            self.detector.starve(self.step, counts)
        return dropped, counts

    def _sum_counts(self, counts: FilterCounts, missing: int) -> tuple[FilterCounts, int]:
        """Both over all ranks; each gives up its collecting by itself, and then all do."""
        if self.session.ranks == 1:
            return counts, missing
        state = asdict(counts)
        values = torch.tensor([*state.values(), missing], dtype=torch.float64, device=self.accelerator.device)
        dist.all_reduce(values)
        *sums, missing = map(round, values.tolist())
        return FilterCounts(**dict(zip(state, sums, strict=True))), missing

    def _summarize(self, groups: Sequence[Group]) -> dict[str, Any]:
        """What the rollouts of a step were like, over all ranks."""
        version = self.step // self.config.rollouts.steps_per_update
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        sums = {
            "reward": sum(rollout.reward for rollout in rollouts),
            **{f"reward/{name}": sum(rollout.rewards[name] for rollout in rollouts) for name in ("task", *TERMS)},
            "pass_rate": sum(group.pass_rate * len(group.rollouts) for group in groups),
            "response_length": sum(len(rollout.response_ids) for rollout in rollouts),
            "cut_off": sum(not rollout.finished for rollout in rollouts),
            "repetition": sum(is_repetitive(rollout.response_ids) for rollout in rollouts),
            "staleness": sum((version - group.version) * len(group.rollouts) for group in groups),
        }
        values = torch.tensor([*sums.values(), len(rollouts)], dtype=torch.float64, device=self.accelerator.device)
        if self.session.ranks > 1:
            dist.all_reduce(values)
        *totals, count = values.tolist()
        means = {name: total / count for name, total in zip(sums, totals, strict=True)}
        return means | {"tokens": round(means["response_length"] * count)}

    # ------------------------------------------------------------------------------------ evaluation, checkpoints

    def _engine(self, model: Any) -> BatchedEngine:
        rollouts = self.config.rollouts
        # On a CPU the engine stays in fp32, whose products are the faster ones there.
        casts = self.accelerator.mixed_precision == "bf16" and self.accelerator.device.type == "cuda"
        return BatchedEngine(
            model,
            slots=rollouts.slots,
            temperature=rollouts.temperature,
            top_p=rollouts.top_p,
            seed=self.config.seed,
            end_of_text=self.tokenizer.eos_token_id,
            dtype=torch.bfloat16 if casts else None,
        )

    def _evaluate(self) -> None:
        with self.session.ledger.span(EVALUATION):
            self.engine.update_weights(self.learner.unwrap())  # as every refill does before it generates
            metrics, samples = self.held_out.evaluate(self.responder, self.curriculum.max_length)
        record = {"kind": "evaluation", "step": self.step, "tokens": self.progress["tokens"], **metrics}
        self.session.record(record, exact=("pass@1",))
        by_task = "  ".join(f"{family} {metrics[f'pass@1/{family}']:.3f}" for family in self.held_out.problems)
        self.session.say(f"step {self.step}: held-out pass@1 {metrics['pass@1']:.3f}  ({by_task})")
        if self.session.rank == 0:
            with closing(MetricsLog(self.folder.samples)) as log:
                log.append(samples_record(self.step, samples), exact=())
        for sample in one_of_each(samples, self.config.evaluation.show):
            mark = "right" if sample.grade.passed else f"wrong, it is {sample.problem.answer}"
            self.session.say(f"    {sample.problem.question} → {sample.text!r} ({mark})")

    def _state(self) -> dict[str, Any]:
        return {
            **self.learner.state(),
            "objective": self.objective,
            "curriculum": self.curriculum,
            "buffer": PerRank(self.buffer),
            "collector": PerRank(self.worker),
            "random": PerRank(RandomState()),
            "progress": {**self.progress, "collapse": self.detector.state_dict()},
            "ledger": self.session.ledger,
        }

    # --------------------------------------------------------------------------------------------- begin and end

    def _finish(self) -> None:
        """Evaluate, save the model folder."""
        self._evaluate()
        self.accelerator.wait_for_everyone()  # all traces are written
        model = self.learner.unwrap()
        if self.session.rank == 0:
            self.session.record_traces(self.folder.path / FOLDER, self.step)
            self.session.save_final(model, self.tokenizer, self.step)
        self.accelerator.wait_for_everyone()

    def _end_collapsed(self) -> int:
        """Save, evaluate, and leave the verdict with its evidence where the next stage looks for it; the exit code."""
        verdict = self.detector.verdict
        assert verdict is not None
        self.session.save(self.step, self._state(), synchronous=True)
        self._evaluate()
        self.accelerator.wait_for_everyone()  # all traces are written
        if self.session.rank == 0:
            self.session.record_traces(self.folder.path / FOLDER, self.step)
            with atomic_file(self.folder.path / COLLAPSE) as path:
                path.write_text(json.dumps(asdict(verdict), indent=2) + "\n")
        self.accelerator.wait_for_everyone()
        self.session.say(str(verdict))
        self.session.ledger.end("collapsed")
        return EXIT_COLLAPSED


def _source_of(task: TaskSection) -> Source:
    """A task as a record of lineage names it: by its section, and a file by its content."""
    content = task.model_dump_json() + (hash_file(Path(task.path)).sha256 if task.path else "")
    made = "procedural" if task.path is None else "human"
    return Source(name=task.name, licence="", provenance=made, content=hashlib.sha256(content.encode()).hexdigest())
