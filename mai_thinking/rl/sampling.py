"""Which problems are learned from, and how long responses may be (MAI-Thinking-1 report §3). Pure logic, no model.

A problem that the policy always or never solves teaches nothing: all its advantages are zero. So a few early rollouts
decide whether a problem is worth a whole group, and the whole group's pass rate whether it is kept.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from mai_thinking.config.sampling import CurriculumSection, SamplingSection


class Verdict(StrEnum):
    """Where a problem stands."""

    EARLY = "early"
    """Its early rollouts are being generated."""
    FULL = "full"
    """The rest of its group is."""
    KEPT = "kept"
    EARLY_TOO_HARD = "early_too_hard"
    """Dropped after the early rollouts: pass rate below `early_range`."""
    EARLY_TOO_EASY = "early_too_easy"
    TOO_HARD = "too_hard"
    """Dropped as a whole group: pass rate below `final_range`."""
    TOO_EASY = "too_easy"


class GroupSampling:
    """One problem's way through the two stages. The trainer's part:

        group = GroupSampling(section)
        while group.wanted:
            scores = …generate and grade `group.wanted` rollouts…
            group.add(scores)
        if group.verdict is Verdict.KEPT: …

    All its rollouts, early ones included, make up the group.
    """

    def __init__(self, section: SamplingSection) -> None:
        self.section = section
        self.verdict = Verdict.FULL if section.early_range is None else Verdict.EARLY
        self.rollouts = 0
        self.passed = 0

    @property
    def wanted(self) -> int:
        """Rollouts still to come in the present stage; 0 once the problem is decided."""
        if self.verdict is Verdict.EARLY:
            return self.section.early_size - self.rollouts
        return self.section.full_size - self.rollouts if self.verdict is Verdict.FULL else 0

    @property
    def pass_rate(self) -> float:
        """ρ_q: the share of the rollouts so far with a positive task reward; 0 before the first."""
        return self.passed / self.rollouts if self.rollouts else 0.0

    def add(self, task_rewards: Sequence[float]) -> Verdict:
        """Take the task rewards (without language and length terms, which make nearly every sum positive) of finished
        rollouts, at most `wanted` and in any order; decide when the stage is complete. ValueError for more."""
        if len(task_rewards) > self.wanted:
            raise ValueError(f"{len(task_rewards)} rollouts for a problem that wants {self.wanted} ({self.verdict})")
        self.rollouts += len(task_rewards)
        self.passed += sum(reward > 0 for reward in task_rewards)
        section = self.section
        if self.verdict is Verdict.EARLY and not self.wanted:
            self.verdict = self._judge(
                section.early_range, Verdict.EARLY_TOO_HARD, Verdict.FULL, Verdict.EARLY_TOO_EASY
            )
        # Not `elif`: with early_size = group_size in all, the early rollouts are the whole group.
        if self.verdict is Verdict.FULL and not self.wanted:
            self.verdict = self._judge(section.final_range, Verdict.TOO_HARD, Verdict.KEPT, Verdict.TOO_EASY)
        return self.verdict

    def _judge(self, bounds: tuple[float, float] | None, below: Verdict, within: Verdict, above: Verdict) -> Verdict:
        if bounds is None or bounds[0] <= self.pass_rate <= bounds[1]:
            return within
        return below if self.pass_rate < bounds[0] else above

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint in the middle of a group."""
        return {"verdict": str(self.verdict), "rollouts": self.rollouts, "passed": self.passed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.verdict = Verdict(state["verdict"])
        self.rollouts, self.passed = state["rollouts"], state["passed"]


@dataclass
class SamplingCounts:
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

    @property
    def solved(self) -> bool:
        """Whether there is nothing left to learn: of at least 200 problems, 97 % too easy."""
        easy = self.early_too_easy + self.too_easy
        problems = easy + self.kept + self.early_too_hard + self.too_hard
        return problems >= 200 and easy >= 0.97 * problems

    def count(self, group: GroupSampling) -> None:
        """Take in a decided group. ValueError while it still wants rollouts."""
        if group.wanted:
            raise ValueError(f"the group still wants {group.wanted} rollouts ({group.verdict})")
        setattr(self, group.verdict, getattr(self, group.verdict) + 1)
        self.rollouts += group.rollouts
        self.rollouts_kept += group.rollouts if group.verdict is Verdict.KEPT else 0

    def add(self, other: "SamplingCounts") -> None:
        """Take in another's counts: a rank's, or an earlier step's."""
        for name, value in asdict(other).items():
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
        }

    def state_dict(self) -> dict[str, int]:
        """Plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict()`."""
        self.__dict__.update(SamplingCounts(**state).__dict__)


class LengthCurriculum:
    """The longest response, in stages that double it. The rule for moving on: `CurriculumSection`."""

    def __init__(self, section: CurriculumSection) -> None:
        self.section = section
        self.stage = 0
        self.steps = 0
        """Of the present stage."""
        self._recent: deque[tuple[int, int]] = deque(maxlen=section.window)

    @property
    def max_length(self) -> int:
        """Tokens of the longest response now."""
        return self.section.start << self.stage

    @property
    def in_last_stage(self) -> bool:
        """Whether there is no longer stage."""
        return self.stage == self.section.stages - 1

    @property
    def penalises_length(self) -> bool:
        """Whether R_len counts now: not in the last stage, unless the config asks for it."""
        return self.section.penalty_in_last_stage or not self.in_last_stage

    @property
    def long_share(self) -> float:
        """Of the responses of the last `window` steps of this stage."""
        responses = sum(total for _, total in self._recent)
        return sum(long for long, _ in self._recent) / responses if responses else 0.0

    def update(self, long: int, responses: int) -> bool:
        """Take in a step: how many responses were generated for it, over all ranks, and how many of them took more
        than half
        of `max_length`; 0 and 0 for a step that learns from what was there. Returns whether the next step is in a new
        stage."""
        self.steps += 1
        self._recent.append((long, responses))
        if self.in_last_stage or not self._moves_on():
            return False
        self.stage, self.steps = self.stage + 1, 0
        self._recent.clear()
        return True

    def _moves_on(self) -> bool:
        section = self.section
        if section.max_steps is not None and self.steps >= section.max_steps:
            return True
        if section.long_share is None or self.steps < max(section.window, section.min_steps):
            return False
        return self.long_share > section.long_share

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"stage": self.stage, "steps": self.steps, "recent": [list(pair) for pair in self._recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.stage, self.steps = state["stage"], state["steps"]
        self._recent = deque(((long, total) for long, total in state["recent"]), maxlen=self.section.window)
