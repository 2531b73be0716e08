"""Which problems are learned from (MAI-Thinking-1 report §3.1.5). Pure logic, no model.

A problem that the policy always or never solves teaches nothing: all its advantages are zero. So a few early rollouts
decide whether a problem is worth a whole group, and the whole group's pass rate whether it is kept.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mai_thinking.config.sampling import SamplingSection
from mai_thinking.rl.rollout import Group, Rollout, Verdict


class ProblemFilter:
    """A problem's way through the two stages. The trainer's part:

        group = problem_filter.open(number, version)
        while wanted := problem_filter.wanted(group):
            problem_filter.add(group, …generate and grade `wanted` rollouts…)
        if group.verdict is Verdict.KEPT: …

    All its rollouts, early ones included, make up the group.
    """

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
        section = self.section
        if group.verdict is Verdict.EARLY and not self.wanted(group):
            ends = Verdict.EARLY_TOO_HARD, Verdict.FULL, Verdict.EARLY_TOO_EASY
            group.verdict = _decide(group.pass_rate, section.early_range, *ends)
        # Not `elif`: with early_size = group_size in all, the early rollouts are the whole group.
        if group.verdict is Verdict.FULL and not self.wanted(group):
            ends = Verdict.TOO_HARD, Verdict.KEPT, Verdict.TOO_EASY
            group.verdict = _decide(group.pass_rate, section.final_range, *ends)


def _decide(
    pass_rate: float, bounds: tuple[float, float] | None, below: Verdict, within: Verdict, above: Verdict
) -> Verdict:
    if bounds is None or bounds[0] <= pass_rate <= bounds[1]:
        return within
    return below if pass_rate < bounds[0] else above


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
    """Tokens of what the engine went on from after each step, the prompt included …"""
    cached: int = 0
    """… and those of them that were in its cache."""

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
        """`groups_kept`, `groups_dropped/RULE`, and `rollouts_used`, the share of the rollouts that is learned from."""
        dropped = ("early_too_hard", "early_too_easy", "too_hard", "too_easy")
        return {
            "groups_kept": self.kept,
            **{f"groups_dropped/{rule}": getattr(self, rule) for rule in dropped},
            "rollouts_used": self.rollouts_kept / max(1, self.rollouts),
            # Of all responses, also those that nothing is learned from.
            "response_length/all": self.tokens / max(1, self.rollouts),
            "cut_off/all": self.cut_off / max(1, self.rollouts),
            "long_share": self.long / max(1, self.rollouts),
            "thought_share": self.thoughts / max(1, self.rollouts),
        } | (self._tools() if self.calls else {})

    def _tools(self) -> dict[str, float]:
        """Calls a response, shares of the calls, share of the responses with a call, and the share of the tokens that a
        step went on from which the engine had in its cache."""
        return {
            "calls": self.calls / self.rollouts,
            "calls_failed": self.failed_calls / self.calls,
            "calls_repeated": self.repeated_calls / self.calls,
            "call_share": self.acting / self.rollouts,
            "cache_hits": self.cached / max(1, self.context),
        }
