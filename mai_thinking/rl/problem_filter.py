"""Which problems are learned from (MAI-Thinking-1 report §3.1.5). Pure logic, no model.

A problem that the policy always or never solves teaches nothing: all its advantages are zero. So a few early rollouts
decide whether a problem is worth a whole group, and the whole group's pass rate whether it is kept.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from mai_thinking.config.grpo import SamplingSection
from mai_thinking.rl.rollout import Group, Rollout, Verdict


class ProblemFilter:
    """A problem's way through the two stages: `open` a group, and `add` graded rollouts to it while it wants some. All
    of them, early ones included, make up the group."""

    def __init__(self, section: SamplingSection) -> None:
        self.section = section

    def open(self, number: int, version: int) -> Group:
        """A group without rollouts yet."""
        return Group(number, version, Verdict.FULL if self.section.early_range is None else Verdict.EARLY)

    def wanted(self, group: Group) -> int:
        """Rollouts still to come in the present stage; 0 once the problem is decided."""
        sizes = {Verdict.EARLY: self.section.early_size, Verdict.FULL: self.section.full_size}
        return sizes[group.verdict] - len(group.rollouts) if group.verdict in sizes else 0

    def add(self, group: Group, rollouts: Sequence[Rollout]) -> None:
        """Take graded rollouts in, at most `wanted` and in any order; decide when the stage is complete. ValueError for
        more."""
        if len(rollouts) > self.wanted(group):
            raise ValueError(
                f"{len(rollouts)} rollouts for a problem that wants {self.wanted(group)} ({group.verdict})"
            )
        group.rollouts += rollouts
        stages = (
            (Verdict.EARLY, self.section.early_range, Verdict.EARLY_TOO_HARD, Verdict.FULL, Verdict.EARLY_TOO_EASY),
            (Verdict.FULL, self.section.final_range, Verdict.TOO_HARD, Verdict.KEPT, Verdict.TOO_EASY),
        )
        # Both in turn: with early_size = group_size in all, the early rollouts are the whole group.
        for stage, bounds, too_hard, within, too_easy in stages:
            if group.verdict is stage and not self.wanted(group):
                low, high = bounds or (0.0, 1.0)
                group.verdict = too_hard if group.pass_rate < low else too_easy if group.pass_rate > high else within


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
    """What became of problems, by their `Verdict`, and of their rollouts, by `OF_A_ROLLOUT` and `rollouts_kept`: those
    learned from. `update` takes in the counts of further problems."""

    def __init__(self, counts: Mapping[str, int] | None = None, /, **more: int) -> None:
        """All names are always there: ranks add their counts up."""
        super().__init__(dict.fromkeys(("kept", *DROPPED, *OF_A_ROLLOUT, "rollouts_kept"), 0))
        self.update(counts or {}, **more)

    @property
    def solved(self) -> bool:
        """Whether there is nothing left to learn: of at least 200 problems that are not too hard, 97 % too easy. Those
        too hard may be beyond anybody."""
        easy, kept = self["early_too_easy"] + self["too_easy"], self["kept"]
        return easy + kept >= 200 and easy >= 0.97 * (easy + kept)

    def count(self, group: Group) -> None:
        """Take in a group. ValueError if it is undecided."""
        if group.verdict in (Verdict.EARLY, Verdict.FULL):
            raise ValueError(f"the group still wants rollouts ({group.verdict})")
        self[str(group.verdict)] += 1
        self["rollouts_kept"] += len(group.rollouts) if group.verdict is Verdict.KEPT else 0
        for rollout in group.rollouts:
            self.update({name: int(value(rollout)) for name, value in OF_A_ROLLOUT.items()})

    def metrics(self) -> dict[str, float]:
        """Groups kept and dropped, and shares of the rollouts, of their calls and of the context."""
        rollouts, calls = max(1, self["rollouts"]), self["calls"]
        found = {
            "groups_kept": self["kept"],
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
