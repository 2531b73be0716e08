"""The reward of a rollout: R = R_task + w_language·R_language − w_length·R_length. MAI-Thinking-1 report §3.1.

A further term is a function here, of the group, and its weight `w_NAME` in `RewardSection`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from mai_thinking.config.tasks import RewardSection, TaskSection
from mai_thinking.rl.language import foreign_words
from mai_thinking.rl.tasks.base import WRONG, Grade


@dataclass(frozen=True)
class GradedGroup:
    """What the terms are computed from: the rollouts of one problem."""

    grades: Sequence[Grade]
    thoughts: Sequence[str]
    """The texts before the answers."""
    lengths: Sequence[int]
    """Response tokens."""
    max_length: int
    """The most tokens that a response may have in this stage."""

    @property
    def pass_rate(self) -> float:
        """ρ_q: the share of the rollouts that pass."""
        return sum(grade.passed for grade in self.grades) / len(self.grades)


class Term(NamedTuple):
    """A part of the reward beside R_task."""

    sign: int
    """+1 for what is paid, −1 for a price."""
    values: Callable[[GradedGroup, RewardSection], list[float]]
    """0 to 1 for each rollout of a group."""


def language(group: GradedGroup, section: RewardSection) -> list[float]:
    """1 in English alone, less alpha per word of another language, at least 0."""
    return [max(1 - section.alpha * foreign_words(thought), 0.0) for thought in group.thoughts]


def length(group: GradedGroup, section: RewardSection) -> list[float]:
    """ρ_q × share of the permitted length: only what a model can do should be done briefly."""
    return [group.pass_rate * length / group.max_length for length in group.lengths]


TERMS = {"language": Term(+1, language), "length": Term(-1, length)}
"""By name; each counts with the weight `w_NAME`. A term without a weight is not computed, and reads 0."""


def group_rewards(group: GradedGroup, section: RewardSection) -> list[dict[str, float]]:
    """Of each rollout of a group: its reward, under `total`, and the reward's parts before their weights, under `task`
    and the terms' names. What failed a gate has the least of every part.

    Raises ValueError for a group without rollouts, or of uneven parts.
    """
    if not group.grades or not len(group.grades) == len(group.thoughts) == len(group.lengths):
        raise ValueError(
            f"a group of {len(group.grades)} grades, {len(group.thoughts)} thoughts, {len(group.lengths)} lengths"
        )
    weights = {name: getattr(section, f"w_{name}") for name in TERMS}
    nothing = [0.0] * len(group.grades)
    values = {name: TERMS[name].values(group, section) if weights[name] else nothing for name in TERMS}
    rewards = []
    for index, (grade, score) in enumerate(zip(group.grades, task_rewards(group.grades), strict=True)):
        parts = {"task": score} | {name: column[index] for name, column in values.items()}
        if grade.gate_failed:
            parts = {"task": 0.0} | {name: float(bool(weights[name]) and TERMS[name].sign < 0) for name in TERMS}
        total = parts["task"]
        for name, weight in weights.items():
            total += TERMS[name].sign * weight * parts[name]
        rewards.append(parts | {"total": total})
    return rewards


def task_rewards(grades: Sequence[Grade]) -> list[float]:
    """R_task of a group's rollouts: their scores; where all tie, the first tie-breakers that differ (§3.6.3)."""
    scores = [grade.score for grade in grades]
    levels = [scores, *zip_longest(*(grade.tie_breakers for grade in grades), fillvalue=0.0)]
    return list(next((level for level in levels if max(level) > min(level)), scores))


def combine(own: Grade, matches: Sequence[bool], section: TaskSection) -> Grade:
    """One grade of the task's own and of whether `section.graders` match, by `section.combination`:

    - `sum`: the mean of the scores by their weights; the verdict is the task's own.
    - `gate`: the task's own, if all graders match; else the least (§3.1: safety gates rather than adds).
    - `lexicographic`: the task's own; the graders, the most important first, break ties of a whole group.

    A grader with `passes` passes an answer too.
    """
    own = own._replace(passed=own.passed or any(m and g.passes for m, g in zip(matches, section.graders, strict=True)))
    if section.combination == "gate":
        return own if all(matches) else no_grade(section)
    if section.combination == "lexicographic":
        return own._replace(tie_breakers=tuple(map(float, matches)))
    weights = [1.0, *(grader.weight for grader in section.graders)]
    scores = [own.score, *map(float, matches)]
    return own._replace(score=sum(w * score for w, score in zip(weights, scores, strict=True)) / sum(weights))


def no_grade(section: TaskSection) -> Grade:
    """Of what could not be graded, such as no answer: wrong, and through no gate."""
    return WRONG._replace(gate_failed=section.combination == "gate" and bool(section.graders))
