"""From problems to groups worth learning from: draw, generate, grade, filter and reward.

MAI-Thinking-1 report §3.1. A *batch* is some problems taken together through both stages of the problem filter.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.rl.engine import Engine
from mai_thinking.rl.grading import GradingPool
from mai_thinking.rl.objective import group_advantages
from mai_thinking.rl.problem_filter import FilterCounts, ProblemFilter
from mai_thinking.rl.rewards import reward_group
from mai_thinking.rl.rollout import Group, Rollout, Verdict
from mai_thinking.rl.tasks import Grade, Problem, TaskSampler
from mai_thinking.rl.template import Template
from mai_thinking.rl.traces import Trace, trace_rows


class Responder:
    """Asks problems and grades the responses: what collecting and evaluating have in common."""

    def __init__(
        self, engine: Engine, pool: GradingPool, template: Template, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.engine, self.pool, self.template, self.tokenizer = engine, pool, template, tokenizer
        self.encoder = Encoder(tokenizer)
        self.graded: list[tuple[float, float]] = []  # When `respond` had answers graded: begin in Unix time, seconds

    def ask(self, problem: Problem, ids: Sequence[int], max_new_tokens: int) -> list[Rollout]:
        """A rollout of the problem for each of `ids`, to be answered."""
        prompt = self.template.prompt(problem.question)
        prompt_ids = self.encoder.encode_prompt(prompt)
        return [Rollout(id, prompt_ids, max_new_tokens, problem, prompt) for id in ids]

    def respond(
        self, asked: Sequence[Rollout], temperature: float | None = None, *, tools: bool = True
    ) -> list[Rollout]:
        """The rollouts with responses and grades, in order; at the engine's temperature unless another is given. Calls
        are answered if `tools`."""
        own, self.engine.tools = self.engine.tools, self.engine.tools if tools else None
        try:
            rollouts = self.engine.generate(asked, temperature)
        finally:
            self.engine.tools = own
        for rollout, text in zip(rollouts, self._texts(rollouts), strict=True):
            rollout.text, rollout.parts = text, (text,)
            if rollout.observed.any():
                segments = np.split(rollout.response_ids, [edge for both in rollout.observations for edge in both])
                rollout.parts = tuple(self.tokenizer.batch_decode(segments, skip_special_tokens=True))
            # The answer is in the last step; what a tool wrote is neither thought nor answer.
            *before, last = rollout.parts[::2]
            rest, rollout.answer = self.template.parse(last)
            rollout.thought = "".join((*before, rest))
        began, begin = time.time(), time.perf_counter()
        grades = self.pool.grade([(rollout.problem, rollout.answer) for rollout in rollouts])
        self.graded.append((began, time.perf_counter() - begin))
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


@dataclass(frozen=True)
class Order:
    """A batch of problems to be answered: as many as fill the engine's slots with early rollouts."""

    number: int  # Of the batch in the run
    first: int  # Number of its first problem; the others of this rank follow at a distance of the number of ranks
    max_length: int
    penalise_length: bool
    version: int | None = None  # Of the weights that alone may answer it; None: whichever are the newest


@dataclass
class Batch:
    """What became of an order."""

    order: Order
    version: int  # Of the weights at its beginning
    groups: list[Group]  # Those to learn from
    counts: FilterCounts
    traces: list[Trace]  # Of all rollouts
    switches: list[tuple[int, int]] = field(default_factory=list)
    """(n, version): newer weights that took over after n decoding steps."""
    worker: int = 0  # Who made it; −1: the learner
    began: float = 0.0  # Unix time
    seconds: float = 0.0  # That it took
    graded: list[tuple[float, float]] = field(default_factory=list)
    """When its answers were graded: begin in Unix time, seconds."""


class RolloutWorker:
    """Answers batches: draws the problems, generates, grades, filters and rewards. The same order gives the same groups
    if the weights are the same, whoever answers it."""

    def __init__(self, config: GrpoConfig, mix: TaskSampler, responder: Responder, *, ranks: int) -> None:
        self.config, self.mix, self.responder, self.ranks = config, mix, responder, ranks
        self.filter = ProblemFilter(config.sampling)
        section = config.sampling
        first_stage = section.early_size if section.early_range else section.full_size
        self.problems = max(1, config.rollouts.slots // first_stage)  # Of a batch

    def answer(self, order: Order, version: int) -> Batch:
        """From weights of `version`."""
        began, begin = time.time(), time.perf_counter()
        self.responder.graded.clear()
        section = self.config.reward
        if not order.penalise_length:
            section = section.model_copy(update={"w_length": 0.0})
        groups = self._generate(order, version)
        counts, traces, step = FilterCounts(), [], version * self.config.rollouts.steps_per_update
        checkpoint = f"{self.config.name}/step-{step:08d}"
        for group in groups:
            reward_group(group, section)
            advantages = group_advantages([rollout.reward for rollout in group.rollouts])
            for rollout, advantage in zip(group.rollouts, advantages, strict=True):
                rollout.advantage = advantage
            counts.count(group)
            traces += trace_rows(group, step=step, checkpoint=checkpoint, lineage=self.config.init_from)
        kept = [group for group in groups if group.verdict is Verdict.KEPT]
        batch = Batch(order, version, kept, counts, traces, began=began, graded=[*self.responder.graded])
        batch.seconds = time.perf_counter() - begin
        return batch

    def _generate(self, order: Order, version: int) -> list[Group]:
        """All groups of the batch, decided, through both stages."""
        numbers = range(order.first, order.first + self.problems * self.ranks, self.ranks)
        groups = [self.filter.open(number, version) for number in numbers]
        while undecided := [group for group in groups if self.filter.wanted(group)]:
            asked: list[Rollout] = []
            for group in undecided:
                first = group.number * self.config.sampling.full_size + len(group.rollouts)
                ids = range(first, first + self.filter.wanted(group))
                asked += self.responder.ask(self.mix.problem("train", group.number), ids, order.max_length)
            answered = iter(self.responder.respond(asked))
            for group in undecided:
                self.filter.add(group, list(islice(answered, self.filter.wanted(group))))
        return groups
