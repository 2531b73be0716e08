"""Which problems are learned from (MAI-Thinking-1 report §3.1.5). Pure logic, no model.

A problem that the policy always or never solves teaches nothing: all its advantages are zero. So a few early rollouts
decide whether a problem is worth a whole group, and the whole group's pass rate whether it is kept.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

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


DROPPED = (Verdict.EARLY_TOO_HARD, Verdict.EARLY_TOO_EASY, Verdict.TOO_HARD, Verdict.TOO_EASY)


@dataclass
class FilterCounts:
    """What became of the problems: how many groups each rule dropped, and what the rollouts went into."""

    kept: int = 0
    early_too_hard: int = 0
    early_too_easy: int = 0
    too_hard: int = 0
    too_easy: int = 0
    rollouts: int = 0
    """Generated for decided problems."""
    rollouts_kept: int = 0
    tokens: int = 0
    """Of all those responses."""
    long: int = 0
    """Responses that took more than half of the limit."""
    cut_off: int = 0
    thoughts: int = 0
    """Responses with a thought before their answer."""
    calls: int = 0
    """Of tools."""
    failed_calls: int = 0
    repeated_calls: int = 0
    acting: int = 0
    """Responses with a call."""
    context: int = 0
    """Tokens that the engine went on from after each step, the prompt included."""
    cached: int = 0
    """Those of them that were in the engine's cache."""

    @property
    def solved(self) -> bool:
        """Whether there is nothing left to learn: of at least 200 problems that are not too hard, 97 % too easy. Those
        too hard may be beyond anybody."""
        easy = self.early_too_easy + self.too_easy
        return easy + self.kept >= 200 and easy >= 0.97 * (easy + self.kept)

    def count(self, group: Group) -> None:
        """Take in a group. ValueError if it is undecided."""
        if group.verdict in (Verdict.EARLY, Verdict.FULL):
            raise ValueError(f"the group still wants rollouts ({group.verdict})")
        setattr(self, group.verdict, getattr(self, group.verdict) + 1)
        self.rollouts += len(group.rollouts)
        self.rollouts_kept += len(group.rollouts) if group.verdict is Verdict.KEPT else 0
        for rollout in group.rollouts:
            self.tokens += len(rollout.response_ids)
            self.long += 2 * len(rollout.response_ids) > rollout.max_new_tokens
            self.cut_off += not rollout.finished
            self.thoughts += rollout.has_thought
            self.calls += len(rollout.calls)
            self.failed_calls += sum(not call.valid for call in rollout.calls)
            self.repeated_calls += sum(call.repeated for call in rollout.calls)
            self.acting += bool(rollout.calls)
            for begin, end in rollout.observations:
                self.context += len(rollout.prompt_ids) + end
                self.cached += len(rollout.prompt_ids) + begin

    def add(self, more: "FilterCounts") -> None:
        """Take in those of further problems."""
        for name, value in asdict(more).items():
            setattr(self, name, getattr(self, name) + value)

    def metrics(self) -> dict[str, float]:
        """Groups kept and dropped, and shares of the rollouts, of their calls and of the context."""
        rollouts = max(1, self.rollouts)
        found = {
            "groups_kept": self.kept,
            **{f"groups_dropped/{rule}": getattr(self, rule) for rule in DROPPED},
            "rollouts_used": self.rollouts_kept / rollouts,
            # Of all responses, also those that nothing is learned from.
            "response_length/all": self.tokens / rollouts,
            "cut_off/all": self.cut_off / rollouts,
            "long_share": self.long / rollouts,
            "thought_share": self.thoughts / rollouts,
        }
        if self.calls:
            found |= {
                "calls": self.calls / rollouts,
                "calls_failed": self.failed_calls / self.calls,
                "calls_repeated": self.repeated_calls / self.calls,
                "call_share": self.acting / rollouts,
                "cache_hits": self.cached / max(1, self.context),
            }
        return found
