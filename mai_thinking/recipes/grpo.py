"""Reinforcement learning (MAI-Thinking-1 report §3): GRPO from a base that has seen no reasoning.

New weights go to the engine, the engine fills the buffer, `steps_per_update` gradient steps empty it. What is in the
buffer is in a checkpoint too.
"""

import time
from typing import Any

import mai_thinking.rl.policy_model as setup
from mai_thinking.config.command import EXIT_COLLAPSED
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.rl.asynchronous import make_collector
from mai_thinking.rl.collapse import COLLAPSE, CollapseDetector, write_verdict
from mai_thinking.rl.evaluation import HeldOut, show_evaluation
from mai_thinking.rl.grading import GradingPool
from mai_thinking.rl.length_curriculum import LengthCurriculum
from mai_thinking.rl.metrics import rollout_metrics, stale_metrics
from mai_thinking.rl.objective import EntropyController
from mai_thinking.rl.packing import pack
from mai_thinking.rl.policy import PolicyLoss
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.rollout_worker import RolloutWorker
from mai_thinking.rl.tasks import TaskSampler
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.training.context import RunContext
from mai_thinking.training.learner import Learner
from mai_thinking.training.ledger import EVALUATION
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.state import PerRank
from mai_thinking.training.trainer import Ending, Recipe, Step, run_recipe


def grpo(config: GrpoConfig, *, dry_run: bool = False) -> int:
    """Run `config`, or go on with it where it was; returns the exit code. `dry_run` prints what it costs and stops."""
    if dry_run:
        print(setup.describe(config))
        return 0
    if config.collapse.enabled and (config.folder / COLLAPSE).exists():
        RunFolder(config.folder).check(config)
        print(f"{config.folder} has collapsed: see its {COLLAPSE}. collapse.enabled=false goes on with it all the same")
        return EXIT_COLLAPSED
    return run_recipe(config, GrpoRecipe)


class GrpoRecipe(Recipe):
    """Problems → rollouts → grades → advantages → packed rows → update → entropy control; pass@1 on held-out ones."""

    exact, exact_evaluation = ("loss", "grad_norm", "reward"), ("pass@1",)
    draws_by_rank = True
    evaluate_first = True

    def __init__(self, config: GrpoConfig, context: RunContext) -> None:
        self.config, self.context = config, context
        rank, ranks = context.rank, context.ranks
        config.check_ranks(ranks)
        self.groups_per_step = config.groups_per_step // ranks
        mix = TaskSampler(config.tasks, config.seed)
        self.data = [setup.source_of(task) for task in config.tasks]
        self.task_contents = setup.task_contents(config.tasks)
        self.architecture = setup.policy_config(config)
        setup.check_lengths(config, mix)
        self.tokenizer = setup.policy_tokenizer(config)
        model, parent = setup.policy_model(config, self.architecture)
        self.parents = [parent]
        pool = context.stack.enter_context(GradingPool(config.tasks, **config.grading.model_dump()))
        precision = context.accelerator.mixed_precision  # each rank has a whole engine, before a learner is divided
        engine = setup.make_engine(model, config, self.tokenizer, precision, context.heartbeat, context.device)
        self.learner = Learner(model, config, context.accelerator, balance=config.balance)
        self.worker = RolloutWorker(config, mix, engine, pool, self.tokenizer, ranks=ranks)
        self.traces = context.folder.path / FOLDER
        self.collector = make_collector(self.worker, TraceStore(self.traces, rank), context)
        self.held_out = HeldOut(mix, config.evaluation, context)
        self.evaluate_every = config.evaluation.every
        section = config.objective
        self.entropy_control = EntropyController(
            section.target_entropy, section.step_size, section.max_relaxation, initial=section.clip_relaxation
        )
        self.curriculum = LengthCurriculum(config.curriculum)
        self.detector = CollapseDetector(config.collapse)

    def describe(self) -> str:
        """What it costs."""
        return setup.describe(self.config)

    def state(self) -> dict[str, Any]:
        """k, the length's stage, what waits to be learned from, and which problem comes next."""
        return {
            "objective": self.entropy_control,
            "curriculum": self.curriculum,
            "collector": PerRank(self.collector),
        }

    def progress(self) -> dict[str, Any]:
        """What the collapse detector has seen, and which tasks these are."""
        return {"collapse": self.detector.state_dict(), "tasks": self.task_contents}

    def load_progress(self, progress: dict[str, Any]) -> None:
        """UsageError if the tasks are not those that the run began with."""
        setup.check_same_tasks(progress["tasks"], self.task_contents, self.config.tasks)
        self.detector.load_state_dict(progress["collapse"])
        self._end_if_collapsed()

    def step(self, step: int) -> Step | None:
        """One gradient step; before the first of each `steps_per_update` the buffer is filled."""
        begin = time.perf_counter()
        version, in_turn = divmod(step - 1, self.config.rollouts.steps_per_update)
        # Problems → rollouts → grades → rewards → advantages (§3.1).
        drawn, counts = self._fill(step - 1, version) if in_turn == 0 else ({}, FilterCounts())
        if self.ending is not None:
            return None
        waited = time.perf_counter() - begin
        groups = self.collector.take(self.groups_per_step)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        summary = rollout_metrics(groups, version, self.context)
        # Packed rows → gradient step: replay of nucleus and experts, trust region, outer clip (§3.1).
        packing, experts = self.config.packing, self.architecture.num_experts
        rows = pack(rollouts, row_length=packing.row_length, rows=packing.rows, num_experts=experts)
        k, advantages = self.entropy_control.clip_relaxation, [rollout.advantage for rollout in rollouts]
        loss = PolicyLoss(
            self.config.objective, self.config.rollouts, advantages, clip_relaxation=k, num_experts=experts
        )
        metrics = self.learner.update(rows, loss, step)
        if not loss.signal:
            self.context.log(f"step {step}: in each group all rewards are equal; the weights stay what they are")
        # Entropy control: k ← clip(k + δ·sign(H* − Ĥ), 0, k_max), for the next step (§3.1).
        self.entropy_control.update(metrics["entropy"])
        # Only from weights that are the engine's own is the difference a mismatch; later it is what was learned.
        if in_turn or summary["staleness"]:
            del metrics["mismatch"]
        tokens = round(summary.pop("tokens"))
        metrics |= {"clip_relaxation": k, **summary, "max_length": self.curriculum.max_length, **drawn}
        self.detector.update({"step": step, **metrics})
        self._end_if_collapsed()
        # Longer responses when many of this stage are long (§3.4).
        if self.curriculum.update(counts["long"], counts["rollouts"]):
            self.context.log(f"step {step}: responses may be {self.curriculum.max_length} tokens long from here on")
        note = f"pass rate {summary['pass_rate']:.2f}  entropy {metrics['entropy']:.2f}  k {k:g}"
        if self.config.rollouts.workers:
            idle = (waited - drawn.get("generation_seconds", 0.0)) / (time.perf_counter() - begin)
            metrics["idle/learner"] = idle
            note += f"  waits {idle:.0%}  staleness {summary['staleness']:.1f}"
        return Step(metrics | {"rollout_seconds": waited}, tokens, note)

    def evaluate(self, step: int, *, last: bool) -> dict[str, Any] | None:
        """pass@1 and pass@k on the held-out problems, with the newest weights."""
        with self.context.ledger.span(EVALUATION):
            self.collector.give_weights(self.learner.unwrap())
            metrics, samples = self.held_out.evaluate(self.worker, self.curriculum.max_length)
        show_evaluation(self.context, step, metrics, samples, self.config.evaluation.show)
        return metrics

    def report(self) -> None:
        """What was left out, for the page of results; of a collapsed run the verdict with its evidence, where the next
        stage looks for it."""
        if self.context.rank == 0 and (notes := self.worker.mix.notes):
            self.context.folder.note(left_out="\n".join(f"- {note}" for note in notes))
        self.collector.finish()
        if self.ending is not None and self.ending.exit_code:
            write_verdict(self.context.folder.path, self.detector.verdict)

    def _fill(self, done: int, version: int) -> tuple[dict[str, float], FilterCounts]:
        """Give the engine the learner's weights, and the buffer what the steps up to the next time take; → metrics, and
        what became of the problems of all ranks."""
        rollouts = self.config.rollouts
        self.collector.give_weights(self.learner.unwrap(), version)
        size = self.groups_per_step * rollouts.steps_per_update * (1 + rollouts.lead)
        stale = self.collector.drop_stale(version - rollouts.max_staleness)
        late, drawn = self.collector.fill(
            size,
            version=version,
            max_length=self.curriculum.max_length,
            penalise_length=self.curriculum.penalises_length,
            hopeless=lambda counts: self.config.collapse.enabled and self.detector.hopeless(counts),
        )
        mine = dict(drawn) | {"missing": max(0, size - len(self.collector.buffer))}
        sums = {name: round(value) for name, value in self.context.sum(mine).items()}
        missing, counts = sums.pop("missing"), FilterCounts(**sums)
        # A rank gives up because all is too easy, or too hard; what all of them drew tells which.
        if missing and self.detector.harder(counts):
            self.detector.starve(done, counts)
            self._end_if_collapsed()
        elif missing:
            self.ending = Ending(f"after step {done} hardly a problem is left to learn from: the tasks are solved")
        return {**stale_metrics(stale + late, self.context), **counts.metrics(), **self.collector.metrics()}, counts

    def _end_if_collapsed(self) -> None:
        if self.config.collapse.enabled and self.detector.verdict is not None:
            self.ending = Ending(str(self.detector.verdict), "collapsed", EXIT_COLLAPSED)
