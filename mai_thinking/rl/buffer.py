"""Groups of rollouts as trees of tensors and plain values, for checkpoints and from process to process."""

from typing import Any

import numpy as np
import torch

from mai_thinking.errors import UsageError
from mai_thinking.rl.rollout import Group, Rollout
from mai_thinking.rl.tasks import WRONG

_PLAIN = ("id", "max_new_tokens", "finished", "rewards", "reward", "advantage")
_ARRAYS = ("response_ids", "observed", "logprobs")


def pack_group(group: Group) -> dict[str, Any]:
    """What the learner and the metrics of its step need, as a tree of tensors and plain values."""
    rollouts = group.rollouts
    plain = {name: [getattr(rollout, name) for rollout in rollouts] for name in _PLAIN}
    arrays = {name: np.concatenate([getattr(rollout, name) for rollout in rollouts]) for name in _ARRAYS}
    # Not every reader of safetensors knows uint16.
    experts = np.concatenate([rollout.experts for rollout in rollouts], axis=1).astype(np.int32)
    return {
        "number": group.number,
        "version": group.version,
        "verdict": group.outcome,
        "prompt": rollouts[0].prompt_ids,
        "passed": [rollout.grade.passed for rollout in rollouts],
        "lengths": [len(rollout.response_ids) for rollout in rollouts],
        **plain,
        **{name: torch.from_numpy(array) for name, array in (arrays | {"experts": experts}).items()},
        "nuclei": [[torch.from_numpy(np.array(bytearray(part))) for part in rollout.nuclei] for rollout in rollouts],
    }


def unpack_group(state: dict[str, Any]) -> Group:
    """The group of `pack_group`. UsageError if an earlier version wrote it."""
    if "nuclei" not in state:
        raise UsageError("the rollouts that wait in this run are of an earlier version; start it under another name")
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
    return Group(state["number"], state["version"], state["verdict"], rollouts)
