"""From problems to groups worth learning from: draw, generate, grade, filter, reward, and keep a trace of everything.

MAI-Thinking-1 report §3.1. A *batch* is some problems taken together through both stages of the problem filter.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import RunError
from mai_thinking.rl.engine import Engine
from mai_thinking.rl.grading import GradingPool
from mai_thinking.rl.objective import group_advantages
from mai_thinking.rl.problem_filter import FilterCounts, ProblemFilter
from mai_thinking.rl.rewards import reward_group
from mai_thinking.rl.rollout import Group, Rollout, Verdict
from mai_thinking.rl.tasks import Grade, Problem, TaskSampler
from mai_thinking.rl.template import Template
from mai_thinking.rl.traces import TraceStore, trace_rows

FRUITLESS_BATCHES = 50
"""So many batches in a row without a group to learn from end the run: the tasks are out of the policy's reach."""


class Responder:
    """Asks problems and grades the responses: what collecting and evaluating have in common."""

    def __init__(
        self, engine: Engine, pool: GradingPool, template: Template, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.engine, self.pool, self.template, self.tokenizer = engine, pool, template, tokenizer
        self.encoder = Encoder(tokenizer)

    def ask(self, problem: Problem, ids: Sequence[int], max_new_tokens: int) -> list[Rollout]:
        """A rollout of the problem for each of `ids`, to be answered."""
        prompt = self.template.prompt(problem.question)
        prompt_ids = self.encoder.encode_prompt(prompt)
        return [Rollout(id, prompt_ids, max_new_tokens, problem, prompt) for id in ids]

    def respond(self, asked: Sequence[Rollout], temperature: float | None = None) -> list[Rollout]:
        """The rollouts with responses and grades, in order; at the engine's temperature unless another is given."""
        rollouts = self.engine.generate(asked, temperature)
        for rollout, text in zip(rollouts, self._texts(rollouts), strict=True):
            rollout.text, (rollout.thought, rollout.answer) = text, self.template.parse(text)
        grades = self.pool.grade([(rollout.problem, rollout.answer) for rollout in rollouts])
        for rollout, grade in zip(rollouts, grades, strict=True):
            rollout.grade = grade
        return rollouts

    def force(
        self, asked: Sequence[tuple[Problem, str, int]], tokens: int, temperature: float | None = None
    ) -> list[Grade]:
        """The grade of the answer that each (problem, thought, rollout id) is led to when it is asked for straight
        after the thought; of at most `tokens` tokens."""
        forced = []
        for problem, thought, id in asked:
            prompt = self.template.prompt(problem.question) + self.template.force_answer(thought)
            forced.append(Rollout(id, self.encoder.encode_prompt(prompt), tokens))
        texts = self._texts(self.engine.generate(forced, temperature))
        answers = [self.template.forced_answer(text) for text in texts]
        return self.pool.grade([(problem, answer) for (problem, _, _), answer in zip(asked, answers, strict=True)])

    def _texts(self, rollouts: Sequence[Rollout]) -> list[str]:
        return self.tokenizer.batch_decode([rollout.response_ids for rollout in rollouts], skip_special_tokens=True)


class RolloutWorker:
    """One rank's supply of groups. Its state says which problem and batch come next; a batch that is collected again
    from the same weights gives the same groups."""

    def __init__(
        self, config: GrpoConfig, mix: TaskSampler, responder: Responder, traces: TraceStore, *, rank: int, ranks: int
    ) -> None:
        self.config, self.mix, self.responder, self.traces = config, mix, responder, traces
        self.filter = ProblemFilter(config.sampling)
        self.rank, self.ranks = rank, ranks
        self.next_problem, self.next_batch = rank, 0
        self.counts = FilterCounts()
        """Of what was collected since the last `take_counts`."""

    def collect(
        self, wanted: int, *, step: int, version: int, max_length: int, penalise_length: bool, checkpoint: str,
        heartbeat: Callable[[], None], hopeless: Callable[[FilterCounts], bool],
    ) -> list[Group]:  # fmt: skip
        """At least `wanted` groups to learn from, batch by batch; fewer if the tasks are solved, or it is `hopeless`,
        by the counts since the last `take_counts`, to go on. RunError if none comes up for too long."""
        section = self.config.reward if penalise_length else self.config.reward.model_copy(update={"w_length": 0.0})
        groups: list[Group] = []
        fruitless = 0
        while len(groups) < wanted:
            batch = self._batch(version, max_length)
            rows = []
            for group in batch:
                reward_group(group, section)
                advantages = group_advantages([rollout.reward for rollout in group.rollouts])
                for rollout, advantage in zip(group.rollouts, advantages, strict=True):
                    rollout.advantage = advantage
                self.counts.count(group)
                rows += trace_rows(group, step=step, checkpoint=checkpoint, lineage=self.config.init_from)
            self.traces.append(self.next_batch, rows)
            self.next_batch += 1
            found = [group for group in batch if group.verdict is Verdict.KEPT]
            groups += found
            if len(groups) < wanted and (self.counts.solved or hopeless(self.counts)):
                break
            fruitless = 0 if found else fruitless + 1
            if fruitless == FRUITLESS_BATCHES:
                raise RunError(
                    f"step {step}: {FRUITLESS_BATCHES} batches of problems without one to learn from "
                    f"({self.counts.metrics()}); easier tasks, wider sampling ranges or larger groups would help"
                )
            heartbeat()
        return groups

    def take_counts(self) -> FilterCounts:
        """What became of the problems since the last call."""
        counts, self.counts = self.counts, FilterCounts()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"next_problem": self.next_problem, "next_batch": self.next_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.next_problem, self.next_batch = state["next_problem"], state["next_batch"]

    def load_from_world(self, states: list[Any], rank: int, world: int) -> None:
        """Behind the furthest of all ranks, in step with the new number of them."""
        first = max(state["next_problem"] for state in states)
        self.next_problem = (first // world + 1) * world + rank
        self.next_batch = max(state["next_batch"] for state in states)

    def _batch(self, version: int, max_length: int) -> list[Group]:
        """As many problems as fill the engine's slots with early rollouts, through both stages."""
        section = self.config.sampling
        first_stage = section.early_size if section.early_range else section.full_size
        count = max(1, self.config.rollouts.slots // first_stage)
        numbers = range(self.next_problem, self.next_problem + count * self.ranks, self.ranks)
        self.next_problem = numbers.stop
        groups = [self.filter.open(number, version) for number in numbers]
        while asked := [one for group in groups for one in self._asked(group, max_length)]:
            answered = iter(self.responder.respond(asked))
            for group in groups:
                self.filter.add(group, list(islice(answered, self.filter.wanted(group))))
        return groups

    def _asked(self, group: Group, max_length: int) -> list[Rollout]:
        """What the group still wants in its present stage."""
        first = group.number * self.config.sampling.full_size + len(group.rollouts)
        ids = range(first, first + self.filter.wanted(group))
        return self.responder.ask(self.mix.problem("train", group.number), ids, max_length) if ids else []
