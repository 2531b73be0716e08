"""The reward of a rollout: R = R_task + w_language·R_language − w_length·R_length. MAI-Thinking-1 report §3.1."""

from collections.abc import Sequence
from dataclasses import dataclass

from mai_thinking.config.tasks import Combination, RewardSection
from mai_thinking.rl.language import foreign_words

_LEVELS = 100
"""Levels of a score that lexicographic order tells apart."""


@dataclass(frozen=True)
class RewardParts:
    """The terms of one rollout's reward, before their weights, and the sum with them. A term whose weight is 0 is not
    computed, and reads 0."""

    task: float
    language: float
    """1 in English alone, less alpha per word of another language, at least 0."""
    length: float
    """Pass rate of the group × share of the permitted length: only what a model can do should be done briefly."""
    total: float


def group_rewards(
    task_scores: Sequence[float],
    thoughts: Sequence[str],
    lengths: Sequence[int],
    *,
    max_length: int,
    section: RewardSection,
) -> tuple[list[RewardParts], float]:
    """Rewards of the rollouts of one problem, and ρ_q, the share of them whose task reward is positive.

    `thoughts` are the texts before the answers, `lengths` the response tokens, `max_length` the most tokens that a
    response may have in this stage. Raises ValueError if the three differ in number or there are none.
    """
    if not task_scores:
        raise ValueError("a group without rollouts has no pass rate")
    pass_rate = sum(score > 0 for score in task_scores) / len(task_scores)
    parts = []
    for score, thought, length in zip(task_scores, thoughts, lengths, strict=True):
        language = max(1 - section.alpha * foreign_words(thought), 0.0) if section.w_language else 0.0
        brevity = pass_rate * length / max_length if section.w_length else 0.0
        total = score + section.w_language * language - section.w_length * brevity
        parts.append(RewardParts(score, language, brevity, total))
    return parts, pass_rate


def combine(scores: Sequence[float], how: Combination, weights: Sequence[float] | None = None) -> float:
    """One score of several graders', each 0 to 1, the most important first; the result is 0 to 1 too.

    - `sum`: the mean by `weights` (equal without them), the only kind that reads them.
    - `gate`: the first, if all the others are 1; else the minimum, 0 (§3.1: safety gates rather than adds).
    - `lexicographic`: ordered by the first; among equals in it, to 1/100, by the second; and so on.

    Raises ValueError if there are no scores, or not as many weights, or no positive weight.
    """
    if not scores:
        raise ValueError("no grader, no score")
    if how == "sum":
        weights = weights if weights is not None else [1.0] * len(scores)
        if sum(weights) <= 0:
            raise ValueError("a weighted sum needs a positive weight")
        return sum(weight * score for weight, score in zip(weights, scores, strict=True)) / sum(weights)
    if how == "gate":
        return scores[0] if all(gate >= 1 for gate in scores[1:]) else 0.0
    place, value = 1.0, 0.0
    for score in scores:  # the digits of a number in base _LEVELS + 1
        place /= _LEVELS + 1
        value += round(score * _LEVELS) * place
    return value / (1 - place)
