"""How long responses may be: 8k tokens at first, doubled from stage to stage (MAI-Thinking-1 report §3)."""

from collections import deque
from typing import Any

from mai_thinking.config.grpo import CurriculumSection


class LengthCurriculum:
    """The longest response, in stages that double it. The rule for moving on: `CurriculumSection`."""

    def __init__(self, section: CurriculumSection) -> None:
        self.section = section
        self.stage = 0
        self.steps = 0  # Of the present stage
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
        than half of `max_length`; 0 and 0 for a step that learns from what was there. Returns whether the next step is
        in a new stage."""
        self.steps += 1
        self._recent.append((long, responses))
        section = self.section
        waited_enough = section.max_steps is not None and self.steps >= section.max_steps
        looked_enough, share = self.steps >= max(section.window, section.min_steps), section.long_share
        wants_room = looked_enough and share is not None and self.long_share > share
        if self.in_last_stage or not (waited_enough or wants_room):
            return False
        self.stage, self.steps = self.stage + 1, 0
        self._recent.clear()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"stage": self.stage, "steps": self.steps, "recent": [list(pair) for pair in self._recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.stage, self.steps = state["stage"], state["steps"]
        self._recent = deque(((long, total) for long, total in state["recent"]), maxlen=self.section.window)
