"""The record of a rollout on its way from a question to a gradient, and of a problem's rollouts together.

Shapes: P prompt tokens, n response tokens, M MoE layers, K experts chosen per token, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks import WRONG, Grade, Problem

# What a group's state has of its rollouts
_PLAIN = ("id", "max_new_tokens", "finished", "rewards", "reward", "advantage")
_ARRAYS = ("response_ids", "observed", "logprobs")


@dataclass(eq=False)
class Rollout:
    """A response, filled in from stage to stage: asked, generated, graded, rewarded."""

    id: int  # Unique in the run: all randomness of the rollout follows from the run's seed and this
    prompt_ids: list[int]
    max_new_tokens: int
    problem: Problem = field(default=Problem("", "", "", ""))
    prompt: str = ""  # As the model sees it, template and all

    # The engine's part.
    response_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """[n], with the end-of-text token if it was drawn, and with what tools answered."""
    observed: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=bool))
    """[n]: tokens that a tool wrote. They are context: no gradient, no log-probability (0), no nucleus (none)."""
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    """[n], under the distribution drawn from: with temperature, renormalised over the nucleus."""
    nuclei: tuple[bytes, ...] = ()  # Of n tokens, by `nuclei.shrink`: those that could have been drawn in their place
    experts: NDArray[np.uint16] = field(default_factory=lambda: np.empty((0, 0, 0), dtype=np.uint16))
    """[M, P + n − 1, K], of every token that went through the model: all but the response's last."""
    finished: bool = False  # Whether it ended by itself, rather than at `max_new_tokens`

    # The graders' part.
    text: str = ""
    parts: tuple[str, ...] = ()  # The text, step by step: in turn what the policy wrote and what came of it
    thought: str = ""  # What the policy itself wrote before the answer; all that it wrote if there is none
    answer: str | None = None
    calls: tuple["Call", ...] = ()  # Of tools, in order
    grade: Grade = WRONG

    # What it earned in its group.
    rewards: dict[str, float] = field(default_factory=dict)  # The reward's parts by name, before their weights
    reward: float = 0.0  # R, their weighted sum
    advantage: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.observed):  # an engine without tools
            self.observed = np.zeros(len(self.response_ids), dtype=bool)

    @property
    def own_ids(self) -> NDArray[np.int64]:
        """The policy's own response tokens, those of all steps."""
        return self.response_ids[~self.observed]

    @property
    def observations(self) -> list[tuple[int, int]]:
        """Begin and end, among the response's tokens, of what tools wrote after each step."""
        edges = np.diff(self.observed.astype(np.int8), prepend=0, append=0).nonzero()[0]
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    @property
    def places(self) -> int:
        """Tokens that go through the model: all but the response's last, which is only predicted."""
        return len(self.prompt_ids) + len(self.response_ids) - 1

    @property
    def has_thought(self) -> bool:
        """Whether there is text before the answer."""
        return self.answer is not None and bool(self.thought.strip())


@dataclass(frozen=True)
class Call:
    """A call of a tool, and what came of it."""

    text: str  # As the policy wrote it
    observation: str
    valid: bool  # Whether there is such a tool and it took the arguments
    repeated: bool  # Whether the same call came before in the rollout
    step: int  # Calls of one step go out together


@dataclass(eq=False)
class Group:
    """A problem's rollouts."""

    number: int  # The run's number of the problem
    version: int  # Of the engine's weights that write them
    outcome: str = ""  # "kept", or why it was dropped: a name in `problem_filter.DROPPED`; empty while undecided
    rollouts: list[Rollout] = field(default_factory=list)

    @property
    def pass_rate(self) -> float:
        """ρ_q: the share of the rollouts so far that pass; 0 before the first."""
        return sum(rollout.grade.passed for rollout in self.rollouts) / max(1, len(self.rollouts))

    def judge(self, bounds: tuple[float, float], stage: str) -> None:
        """Drop the problem if the pass rate lies outside of the `bounds` of this stage of the problem filter (§3.1.5):
        one that is always or never solved has advantages of zero, and teaches nothing."""
        low, high = bounds
        wrong = "too_hard" if self.pass_rate < low else "too_easy" if self.pass_rate > high else ""
        self.outcome = wrong and stage + wrong

    def state_dict(self) -> dict[str, Any]:
        """What the learner and the metrics of its step need, as a tree of tensors and plain values."""
        rollouts = self.rollouts
        arrays = {name: np.concatenate([getattr(rollout, name) for rollout in rollouts]) for name in _ARRAYS}
        # Not every reader of safetensors knows uint16.
        arrays["experts"] = np.concatenate([rollout.experts for rollout in rollouts], axis=1).astype(np.int32)
        return {
            "number": self.number,
            "version": self.version,
            "verdict": self.outcome,
            "prompt": rollouts[0].prompt_ids,
            "passed": [rollout.grade.passed for rollout in rollouts],
            "lengths": [len(rollout.response_ids) for rollout in rollouts],
            **{name: [getattr(rollout, name) for rollout in rollouts] for name in _PLAIN},
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
            "nuclei": [
                [torch.from_numpy(np.array(bytearray(part))) for part in rollout.nuclei] for rollout in rollouts
            ],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Group":
        """From `state_dict()`. UsageError if an earlier version wrote it."""
        if "nuclei" not in state:
            raise UsageError(
                "the rollouts that wait in this run are of an earlier version; start it under another name"
            )
        lengths, prompt = state["lengths"], state["prompt"]
        arrays: dict[str, Any] = {name: np.split(state[name].numpy(), np.cumsum(lengths)[:-1]) for name in _ARRAYS}
        arrays["nuclei"] = [tuple(part.numpy().tobytes() for part in parts) for parts in state["nuclei"]]
        places = np.cumsum([len(prompt) + length - 1 for length in lengths])[:-1]
        arrays["experts"] = np.split(state["experts"].numpy().astype(np.uint16), places, axis=1)
        rollouts = [
            Rollout(
                prompt_ids=prompt,
                grade=WRONG._replace(passed=passed),
                **{name: state[name][index] for name in _PLAIN},
                **{name: parts[index] for name, parts in arrays.items()},
            )
            for index, passed in enumerate(state["passed"])
        ]
        return cls(state["number"], state["version"], state["verdict"], rollouts)
