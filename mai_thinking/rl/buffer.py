"""Groups of rollouts that wait for their gradient step."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mai_thinking.rl.rollouts import Rollout


@dataclass(frozen=True)
class Group:
    """A problem's whole group, with what its rollouts earned."""

    number: int
    """The run's number of the problem."""
    version: int
    """Of the engine's weights that wrote it."""
    rollouts: list[Rollout]
    rewards: list[dict[str, float]]
    """As `rewards.group_rewards` gives them."""
    advantages: list[float]
    pass_rate: float


class RolloutBuffer:
    """First in, first out. Its state is this rank's own, pending rollouts included; at another number of ranks the
    groups are dealt out anew."""

    def __init__(self) -> None:
        self._groups: deque[Group] = deque()

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, groups: Sequence[Group]) -> None:
        """Behind those that are there."""
        self._groups.extend(groups)

    def drop_stale(self, oldest: int) -> int:
        """Drop the groups of weights before version `oldest`; → how many."""
        before = len(self._groups)
        self._groups = deque(group for group in self._groups if group.version >= oldest)
        return before - len(self._groups)

    def take(self, count: int) -> list[Group]:
        """The `count` oldest groups."""
        return [self._groups.popleft() for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """A tree of tensors and plain values."""
        return {"groups": [_pack_group(group) for group in self._groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._groups = deque(_unpack_group(group) for group in state["groups"])

    def load_from_world(self, states: list[Any], rank: int, world: int) -> None:
        """All ranks' groups in the order of their problems, every `world`-th of them to this rank."""
        groups = sorted((g for state in states for g in state["groups"]), key=lambda g: (g["version"], g["number"]))
        self.load_state_dict({"groups": groups[rank::world]})


def _pack_group(group: Group) -> dict[str, Any]:
    rollouts = group.rollouts
    return {
        "number": group.number,
        "version": group.version,
        "advantages": group.advantages,
        "pass_rate": group.pass_rate,
        "rewards": group.rewards,
        "request_ids": [rollout.request_id for rollout in rollouts],
        "finished": [rollout.finished for rollout in rollouts],
        "prompt": rollouts[0].prompt_ids,
        "lengths": [len(rollout.response_ids) for rollout in rollouts],
        "response_ids": torch.from_numpy(np.concatenate([rollout.response_ids for rollout in rollouts])),
        "logprobs": torch.from_numpy(np.concatenate([rollout.logprobs for rollout in rollouts])),
        "nucleus": torch.from_numpy(np.concatenate([rollout.nucleus for rollout in rollouts])),
        # Not every reader of safetensors knows uint16.
        "experts": torch.from_numpy(np.concatenate([r.experts for r in rollouts], axis=1).astype(np.int32)),
    }


def _unpack_group(state: dict[str, Any]) -> Group:
    lengths, prompt = state["lengths"], state["prompt"]
    ends = np.cumsum(lengths)[:-1]
    parts = {name: np.split(state[name].numpy(), ends) for name in ("response_ids", "logprobs", "nucleus")}
    places = np.cumsum([len(prompt) + length - 1 for length in lengths])[:-1]
    experts = np.split(state["experts"].numpy().astype(np.uint16), places, axis=1)
    rollouts = [
        Rollout(request, prompt, parts["response_ids"][i], parts["logprobs"][i], parts["nucleus"][i], experts[i], ended)
        for i, (request, ended) in enumerate(zip(state["request_ids"], state["finished"], strict=True))
    ]
    return Group(state["number"], state["version"], rollouts, state["rewards"], state["advantages"], state["pass_rate"])
