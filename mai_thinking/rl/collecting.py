"""From problems to groups worth learning from: draw, generate, grade, filter, reward, and keep a trace of everything.

MAI-Thinking-1 report §3.1. A *wave* is some problems taken together through both stages of problem sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import RunError
from mai_thinking.rl.buffer import Group
from mai_thinking.rl.grading import GradingPool
from mai_thinking.rl.objective import group_advantages
from mai_thinking.rl.rewards import TERMS, GradedGroup, group_rewards
from mai_thinking.rl.rollouts import Engine, Request, Rollout
from mai_thinking.rl.sampling import GroupSampling, SamplingCounts, Verdict
from mai_thinking.rl.tasks import Grade, Problem, TaskMix
from mai_thinking.rl.template import Parsed, Template
from mai_thinking.rl.traces import Trace, TraceStore

FRUITLESS_WAVES = 50
"""So many waves in a row without a group to learn from end the run: the tasks are out of the policy's reach."""


@dataclass
class Attempt:
    """A rollout, what it says, and its grade."""

    rollout: Rollout
    text: str
    parsed: Parsed
    grade: Grade

    @property
    def has_thought(self) -> bool:
        """Whether there is text before the answer."""
        return self.parsed.answer is not None and bool(self.parsed.thought.strip())


@dataclass
class _Candidate:
    """A problem on its way through the stages."""

    number: int
    problem: Problem
    prompt: str
    prompt_ids: list[int]
    sampling: GroupSampling
    attempts: list[Attempt] = field(default_factory=list)


class Responder:
    """Asks problems and grades the responses: what collecting and evaluating have in common."""

    def __init__(
        self, engine: Engine, pool: GradingPool, template: Template, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.engine, self.pool, self.template, self.tokenizer = engine, pool, template, tokenizer
        self.encoder = Encoder(tokenizer)

    def encode(self, problem: Problem) -> tuple[str, list[int]]:
        """The prompt's text, and its tokens behind the end-of-text token that opens every document."""
        prompt = self.template.prompt(problem.question)
        return prompt, self.encoder.encode_prompt(prompt)

    def force(
        self, asked: Sequence[tuple[Problem, str, int]], tokens: int, temperature: float | None = None
    ) -> list[Grade]:
        """The grade of the answer that each (problem, thought, request id) is led to when it is asked for straight
        after the thought; of at most `tokens` tokens, and of one line."""
        starts = [self.template.force_answer(thought) for _, thought, _ in asked]
        requests = [
            Request(request_id, self.encoder.encode_prompt(self.template.prompt(problem.question) + start), tokens)
            for (problem, _, request_id), start in zip(asked, starts, strict=True)
        ]
        rollouts = self.engine.generate(requests, temperature)
        texts = self.tokenizer.batch_decode([rollout.response_ids for rollout in rollouts], skip_special_tokens=True)
        answers = [self.template.parse(start + text).answer for start, text in zip(starts, texts, strict=True)]
        return self.pool.grade([(problem, answer) for (problem, _, _), answer in zip(asked, answers, strict=True)])

    def respond(self, asked: Sequence[tuple[Problem, Request]], temperature: float | None = None) -> list[Attempt]:
        """A graded response to each request, in order; at the engine's temperature unless another is given."""
        rollouts = self.engine.generate([request for _, request in asked], temperature)
        texts = self.tokenizer.batch_decode([rollout.response_ids for rollout in rollouts], skip_special_tokens=True)
        parsed = [self.template.parse(text) for text in texts]
        problems = [problem for problem, _ in asked]
        grades = self.pool.grade([(problem, p.answer) for problem, p in zip(problems, parsed, strict=True)])
        return [Attempt(*parts) for parts in zip(rollouts, texts, parsed, grades, strict=True)]


class Collector:
    """One rank's supply of groups. Its state says which problem and wave come next; a wave that is collected again
    from the same weights gives the same groups."""

    def __init__(
        self, config: GrpoConfig, mix: TaskMix, responder: Responder, traces: TraceStore, *, rank: int, ranks: int
    ) -> None:
        self.config, self.mix, self.responder, self.traces = config, mix, responder, traces
        self.rank, self.ranks = rank, ranks
        self.next_problem, self.next_wave = rank, 0
        self.counts = SamplingCounts()
        """Of what was collected since the last `take_counts`."""

    def collect(
        self, wanted: int, *, step: int, version: int, max_length: int, penalise_length: bool, checkpoint: str,
        beat: Callable[[], None], hopeless: Callable[[SamplingCounts], bool],
    ) -> list[Group]:  # fmt: skip
        """At least `wanted` groups to learn from, in waves; fewer if the tasks are solved, or it is `hopeless`, by the
        counts since the last `take_counts`, to go on. RunError if none comes up for too long."""
        groups: list[Group] = []
        fruitless = 0
        while len(groups) < wanted:
            wave = self._wave(max_length)
            found = self._judge(wave, step, version, max_length, penalise_length, checkpoint)
            groups += found
            if len(groups) < wanted and (self.counts.solved or hopeless(self.counts)):
                break
            fruitless = 0 if found else fruitless + 1
            if fruitless == FRUITLESS_WAVES:
                raise RunError(
                    f"step {step}: {FRUITLESS_WAVES} waves of problems without one to learn from "
                    f"({self.counts.metrics()}); easier tasks, wider sampling ranges or larger groups would help"
                )
            beat()
        return groups

    def take_counts(self) -> SamplingCounts:
        """What became of the problems since the last call."""
        counts, self.counts = self.counts, SamplingCounts()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"next_problem": self.next_problem, "next_wave": self.next_wave}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.next_problem, self.next_wave = state["next_problem"], state["next_wave"]

    def load_from_world(self, states: list[Any], rank: int, world: int) -> None:
        """Behind the furthest of all ranks, in step with the new number of them."""
        first = max(state["next_problem"] for state in states)
        self.next_problem = (first // world + 1) * world + rank
        self.next_wave = max(state["next_wave"] for state in states)

    def _wave(self, max_length: int) -> list[_Candidate]:
        """As many problems as fill the engine's slots with early rollouts, through both stages."""
        section = self.config.sampling
        first_stage = section.early_size if section.early_range else section.full_size
        wave = [self._candidate() for _ in range(max(1, self.config.rollouts.slots // first_stage))]
        while open_ones := [candidate for candidate in wave if candidate.sampling.wanted]:
            asked = [
                (candidate.problem, Request(self._request_id(candidate, sample), candidate.prompt_ids, max_length))
                for candidate in open_ones
                for sample in range(
                    candidate.sampling.rollouts, candidate.sampling.rollouts + candidate.sampling.wanted
                )
            ]
            attempts = iter(self.responder.respond(asked))
            for candidate in open_ones:
                new = [next(attempts) for _ in range(candidate.sampling.wanted)]
                candidate.attempts += new
                candidate.sampling.add([float(attempt.grade.passed) for attempt in new])
        return wave

    def _candidate(self) -> _Candidate:
        number, self.next_problem = self.next_problem, self.next_problem + self.ranks
        problem = self.mix.problem("train", number)
        return _Candidate(number, problem, *self.responder.encode(problem), GroupSampling(self.config.sampling))

    def _count_lengths(self, attempts: Sequence[Attempt], max_length: int) -> None:
        for attempt in attempts:
            length = len(attempt.rollout.response_ids)
            self.counts.tokens += length
            self.counts.long += 2 * length > max_length
            self.counts.cut_off += not attempt.rollout.finished
            self.counts.thoughts += attempt.has_thought

    def _request_id(self, candidate: _Candidate, sample: int) -> int:
        return candidate.number * self.config.sampling.full_size + sample

    def _judge(
        self, wave: list[_Candidate], step: int, version: int, max_length: int, penalise: bool, checkpoint: str
    ) -> list[Group]:
        """Rewards, traces of all, and the groups to learn from."""
        section = self.config.reward if penalise else self.config.reward.model_copy(update={"w_length": 0.0})
        groups, traces = [], []
        for candidate in wave:
            attempts = candidate.attempts
            graded = GradedGroup(
                [attempt.grade for attempt in attempts],
                [attempt.parsed.thought for attempt in attempts],
                [len(attempt.rollout.response_ids) for attempt in attempts],
                max_length,
            )
            rewards, pass_rate = group_rewards(graded, section), graded.pass_rate
            self.counts.count(candidate.sampling)
            self._count_lengths(attempts, max_length)
            if candidate.sampling.verdict is Verdict.KEPT:
                rollouts = [attempt.rollout for attempt in attempts]
                advantages = group_advantages([parts["total"] for parts in rewards])
                groups.append(Group(candidate.number, version, rollouts, rewards, advantages, pass_rate))
            for attempt, parts in zip(attempts, rewards, strict=True):
                rollout = attempt.rollout
                traces.append(
                    Trace(
                        step=step,
                        engine_version=version,
                        request_id=rollout.request_id,
                        group_id=candidate.number,
                        task=candidate.problem.task,
                        problem_id=candidate.problem.id,
                        prompt=candidate.prompt,
                        prompt_ids=rollout.prompt_ids,
                        response=attempt.text,
                        response_ids=rollout.response_ids,
                        logprobs=rollout.logprobs,
                        finished=rollout.finished,
                        answer=attempt.parsed.answer,
                        reference=candidate.problem.answer,
                        passed=attempt.grade.passed,
                        reward=parts["total"],
                        **{f"reward_{name}": parts[name] for name in ("task", *TERMS)},
                        pass_rate=pass_rate,
                        verdict=str(candidate.sampling.verdict),
                        checkpoint=checkpoint,
                        lineage=self.config.init_from,
                    )
                )
        self.traces.append(self.next_wave, traces)
        self.next_wave += 1
        return groups
