"""What became of the problems that were begun, and of their rollouts (MAI-Thinking-1 report §3.1.5)."""

from collections import Counter
from collections.abc import Callable, Mapping

from mai_thinking.rl.rollout import Group, Rollout

KEPT = "kept"
DROPPED = ("early_too_hard", "early_too_easy", "too_hard", "too_easy")
OF_A_ROLLOUT: dict[str, Callable[[Rollout], int]] = {
    "rollouts": lambda r: 1,
    "tokens": lambda r: len(r.response_ids),
    "long": lambda r: 2 * len(r.response_ids) > r.max_new_tokens,
    "cut_off": lambda r: not r.finished,
    "thoughts": lambda r: r.has_thought,
    "calls": lambda r: len(r.calls),  # of tools
    "failed_calls": lambda r: sum(not call.valid for call in r.calls),
    "repeated_calls": lambda r: sum(call.repeated for call in r.calls),
    "acting": lambda r: bool(r.calls),
    # Tokens that the engine went on from after each step, the prompt included; and those that were in its cache.
    "context": lambda r: sum(len(r.prompt_ids) + end for _, end in r.observations),
    "cached": lambda r: sum(len(r.prompt_ids) + begin for begin, _ in r.observations),
}
"""What is counted of every rollout that was generated, also for problems that are then dropped."""


class FilterCounts(Counter[str]):
    """What became of problems, by their `outcome`, and of their rollouts, by `OF_A_ROLLOUT` and `rollouts_kept`: those
    learned from. `update` takes in the counts of further problems."""

    def __init__(self, counts: Mapping[str, int] | None = None, /, **more: int) -> None:
        """All names are always there: ranks add their counts up."""
        super().__init__(dict.fromkeys((KEPT, *DROPPED, *OF_A_ROLLOUT, "rollouts_kept"), 0))
        self.update(counts or {}, **more)

    @property
    def solved(self) -> bool:
        """Whether there is nothing left to learn: of at least 200 problems that are not too hard, 97 % too easy. Those
        too hard may be beyond anybody."""
        easy, kept = self["early_too_easy"] + self["too_easy"], self[KEPT]
        return easy + kept >= 200 and easy >= 0.97 * (easy + kept)

    def count(self, group: Group) -> None:
        """Take in a group. ValueError if it is undecided."""
        if not group.outcome:
            raise ValueError(f"group {group.number} is undecided")
        self[group.outcome] += 1
        self["rollouts_kept"] += len(group.rollouts) if group.outcome == KEPT else 0
        for rollout in group.rollouts:
            self.update({name: int(value(rollout)) for name, value in OF_A_ROLLOUT.items()})

    def metrics(self) -> dict[str, float]:
        """Groups kept and dropped, and shares of the rollouts, of their calls and of the context."""
        rollouts, calls = max(1, self["rollouts"]), self["calls"]
        found = {
            "groups_kept": self[KEPT],
            **{f"groups_dropped/{rule}": self[rule] for rule in DROPPED},
            "rollouts_used": self["rollouts_kept"] / rollouts,
            "response_length/all": self["tokens"] / rollouts,
            "cut_off/all": self["cut_off"] / rollouts,
            "long_share": self["long"] / rollouts,
            "thought_share": self["thoughts"] / rollouts,
        }
        if calls:
            found |= {
                "calls": calls / rollouts,
                "calls_failed": self["failed_calls"] / calls,
                "calls_repeated": self["repeated_calls"] / calls,
                "call_share": self["acting"] / rollouts,
                "cache_hits": self["cached"] / max(1, self["context"]),
            }
        return found
