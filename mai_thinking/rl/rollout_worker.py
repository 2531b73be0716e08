"""From problems to groups worth learning from: draw, generate, grade, filter and reward.

MAI-Thinking-1 report §3.1. The problems of a batch go together through both stages of the problem filter (§3.1.5).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.rl.engine import Engine
from mai_thinking.rl.grading import GradingPool
from mai_thinking.rl.objective import group_advantages
from mai_thinking.rl.problem_filter import KEPT, FilterCounts
from mai_thinking.rl.rewards import reward_group
from mai_thinking.rl.rollout import Group, Rollout
from mai_thinking.rl.tasks import Grade, Problem, TaskSampler
from mai_thinking.rl.template import Template
from mai_thinking.rl.traces import Trace, trace_rows


@dataclass(unsafe_hash=True)
class RolloutBatch:
    """Some problems, as many as fill the engine's slots with early rollouts: first asked for, then answered. What asks
    for the same is the same batch."""

    number: int  # In the run
    first: int  # Number of its first problem; the others of this rank follow at a distance of the number of ranks
    max_length: int
    penalise_length: bool
    only: int | None = None  # The version of the weights that alone may answer it; None: whichever are the newest

    # The answer.
    version: int = field(default=0, compare=False)  # Of the weights at its beginning
    groups: list[Group] = field(default_factory=list, compare=False)  # Those to learn from
    counts: FilterCounts = field(default_factory=FilterCounts, compare=False)
    traces: list[Trace] = field(default_factory=list, compare=False)  # Of all rollouts
    switches: list[tuple[int, int]] = field(default_factory=list, compare=False)
    """(n, version): newer weights that took over after n decoding steps."""
    worker: int = field(default=0, compare=False)  # Who made it; −1: the learner
    began: float = field(default=0.0, compare=False)  # Unix time
    seconds: float = field(default=0.0, compare=False)  # That it took
    graded: list[tuple[float, float]] = field(default_factory=list, compare=False)
    """When its answers were graded: begin in Unix time, seconds."""

    @property
    def asked(self) -> dict[str, Any]:
        """Plain values: what is asked for."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.compare}


class RolloutWorker:
    """An engine with its tasks and graders: asks problems and grades the responses, for the learner and for evaluation.
    The same batch has the same groups if the weights are the same, whoever answers it."""

    def __init__(
        self,
        config: GrpoConfig,
        mix: TaskSampler,
        engine: Engine,
        pool: GradingPool,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ranks: int,
    ) -> None:
        self.config, self.mix, self.engine, self.pool, self.tokenizer = config, mix, engine, pool, tokenizer
        self.template, self.encoder, self.ranks = Template(config.template), Encoder(tokenizer), ranks
        self.problems = max(1, config.rollouts.slots // config.sampling.stages[0][0])  # Of a batch
        self._graded: list[tuple[float, float]] = []  # When answers were graded: begin in Unix time, seconds

    def answer(self, asked: RolloutBatch, version: int) -> RolloutBatch:
        """The batch with its answer, from weights of `version`."""
        began, begin = time.time(), time.perf_counter()
        self._graded.clear()
        section = self.config.reward
        if not asked.penalise_length:
            section = section.model_copy(update={"w_length": 0.0})
        counts, traces, step = FilterCounts(), [], version * self.config.rollouts.steps_per_update
        checkpoint = f"{self.config.name}/step-{step:08d}"
        groups = self._generate(asked, version)
        for group in groups:
            reward_group(group, section)
            advantages = group_advantages([rollout.reward for rollout in group.rollouts])
            for rollout, advantage in zip(group.rollouts, advantages, strict=True):
                rollout.advantage = advantage
            counts.count(group)
            traces += trace_rows(group, step=step, checkpoint=checkpoint, lineage=self.config.init_from)
        kept = [group for group in groups if group.outcome == KEPT]
        batch = replace(asked, version=version, groups=kept, counts=counts, traces=traces, graded=[*self._graded])
        batch.began, batch.seconds = began, time.perf_counter() - begin
        return batch

    def _generate(self, batch: RolloutBatch, version: int) -> list[Group]:
        """All groups of the batch, decided, through both stages (§3.1.5)."""
        numbers = range(batch.first, batch.first + self.problems * self.ranks, self.ranks)
        groups = [Group(number, version) for number in numbers]
        for size, bounds, stage in self.config.sampling.stages:
            undecided, asked = [group for group in groups if not group.outcome], []
            for group in undecided:
                first = group.number * self.config.sampling.full_size
                ids = range(first + len(group.rollouts), first + size)
                asked += self.ask(self.mix.problem("train", group.number), ids, batch.max_length)
            answered = iter(self.respond(asked) if asked else ())
            for group in undecided:
                group.rollouts += islice(answered, size - len(group.rollouts))
                group.judge(bounds, stage)
        for group in groups:
            group.outcome = group.outcome or KEPT
        return groups

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
        self._graded.append((began, time.perf_counter() - begin))
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
