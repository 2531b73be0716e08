"""The reward of a rollout: R = R_task + w_language·R_language − w_length·R_length. MAI-Thinking-1 report §3.1.

A further term is a function here, of the group, and its weight `w_NAME` in `RewardSection`.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest

from mai_thinking.config.tasks import RewardSection
from mai_thinking.rl.language import foreign_words
from mai_thinking.rl.rollout import Group
from mai_thinking.rl.tasks import Grade


def language(group: Group, section: RewardSection) -> list[float]:
    """1 in English alone, less alpha per word of another language, at least 0."""
    return [max(1 - section.alpha * foreign_words(rollout.thought), 0.0) for rollout in group.rollouts]


def length(group: Group, section: RewardSection) -> list[float]:
    """ρ_q × share of the permitted length: only what a model can do should be done briefly."""
    rate = 1.0 if section.flat_length else group.pass_rate
    return [rate * len(rollout.own_ids) / rollout.max_new_tokens for rollout in group.rollouts]


def calls(group: Group, section: RewardSection) -> list[float]:
    """ρ_q × share of the group's most calls: what can be done with fewer should be (§3.4.1)."""
    most = max(1, *(len(rollout.calls) for rollout in group.rollouts))
    return [group.pass_rate * len(rollout.calls) / most for rollout in group.rollouts]


def waste(group: Group, section: RewardSection) -> list[float]:
    """Share of the calls that no tool took, or that had been made before (§3.4.1)."""
    wasted = [sum(call.repeated or not call.valid for call in rollout.calls) for rollout in group.rollouts]
    return [count / max(1, len(rollout.calls)) for count, rollout in zip(wasted, group.rollouts, strict=True)]


TERMS: dict[str, tuple[int, Callable[[Group, RewardSection], list[float]]]] = {
    "language": (+1, language),
    "length": (-1, length),
    "calls": (-1, calls),
    "waste": (-1, waste),
}
"""Name → +1 for what is paid, −1 for a price; and the values, 0 to 1 for each rollout of a group. Each counts with the
weight `w_NAME`. A term without a weight is not computed, and reads 0."""


def reward_group(group: Group, section: RewardSection) -> None:
    """Fill in the rollouts' `reward` and `rewards`: `task` and the terms. What failed a gate has the least of each."""
    weights = {name: getattr(section, f"w_{name}") for name in TERMS}
    values = {name: TERMS[name][1](group, section) for name, weight in weights.items() if weight}
    scores = task_rewards([rollout.grade for rollout in group.rollouts])
    for index, rollout in enumerate(group.rollouts):
        parts = {"task": scores[index]} | {name: values[name][index] if name in values else 0.0 for name in TERMS}
        if rollout.grade.gate_failed:
            parts = {"task": 0.0} | {name: float(name in values and TERMS[name][0] < 0) for name in TERMS}
        rollout.rewards, rollout.reward = parts, parts["task"]
        for name, weight in weights.items():
            rollout.reward += TERMS[name][0] * weight * parts[name]


def task_rewards(grades: Sequence[Grade]) -> list[float]:
    """R_task of a group's rollouts: their scores; where all tie, the first tie-breakers that differ (§3.6.3)."""
    scores = [grade.score for grade in grades]
    levels = [scores, *zip_longest(*(grade.tie_breakers for grade in grades), fillvalue=0.0)]
    return list(next((level for level in levels if max(level) > min(level)), scores))
