"""What the rollouts of a gradient step were like."""

from collections.abc import Sequence

from mai_thinking.rl.collapse import is_repetitive
from mai_thinking.rl.rewards import TERMS
from mai_thinking.rl.rollout import Group
from mai_thinking.training.context import RunContext


def stale_metrics(groups: Sequence[Group], context: RunContext) -> dict[str, float]:
    """How many groups were dropped for their age and, if any were, how hard and how long they were. Collective."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sums = context.sum(
        {
            "groups": len(groups),
            "pass_rate": sum(group.pass_rate for group in groups),
            "response_length": sum(len(rollout.response_ids) for rollout in rollouts),
            "rollouts": len(rollouts),
        }
    )
    found: dict[str, float] = {"groups_stale": round(sums["groups"])}
    if groups_stale := sums["groups"]:
        found["pass_rate/stale"] = sums["pass_rate"] / groups_stale
        found["response_length/stale"] = sums["response_length"] / sums["rollouts"]
    return found


def rollout_metrics(groups: Sequence[Group], version: int, context: RunContext) -> dict[str, float]:
    """Means over all ranks' rollouts, and `tokens`, the number of all their response tokens; `version` is that of the
    engine's newest weights. Collective."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sums = context.sum(
        {
            "reward": sum(rollout.reward for rollout in rollouts),
            **{f"reward/{name}": sum(rollout.rewards[name] for rollout in rollouts) for name in ("task", *TERMS)},
            "pass_rate": sum(group.pass_rate * len(group.rollouts) for group in groups),
            "response_length": sum(len(rollout.own_ids) for rollout in rollouts),
            "cut_off": sum(not rollout.finished for rollout in rollouts),
            "repetition": sum(is_repetitive(rollout.own_ids) for rollout in rollouts),
            "staleness": sum((version - group.version) * len(group.rollouts) for group in groups),
            "count": len(rollouts),
        }
    )
    count = sums.pop("count")
    return {name: total / count for name, total in sums.items()} | {"tokens": sums["response_length"]}
