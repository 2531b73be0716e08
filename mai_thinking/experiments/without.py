"""A script without one part of asynchronous RL (MAI-Thinking-1 report §3.6), to see what that part is for:
`python -m mai_thinking.experiments.without PART SCRIPT [ARGUMENT …]`.

`pacing`: workers generate without a pause, and what has become too old is thrown away. `ratio`: the denominator of a
token's ratio is its log-probability under the weights that are about to learn from it, not under those that wrote it,
so that every ratio is 1 and no clip ever acts. Neither is a choice that a config offers.
"""

import runpy
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch import Tensor

from mai_thinking.config.command import exit_with
from mai_thinking.errors import UsageError
from mai_thinking.rl.objective import grpo_loss


def _loss_at_ratio_one(logprobs: Tensor, old_logprobs: Tensor, *rest: Any, **settings: Any) -> Any:
    return grpo_loss(logprobs, logprobs.detach(), *rest, **settings)


PARTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "pacing": ("mai_thinking.rl.asynchronous.Ahead.in_time", lambda self, groups: True),
    "ratio": ("mai_thinking.rl.policy.grpo_loss", _loss_at_ratio_one),
}
"""Where a part is, and what stands there without it."""


def main() -> None:
    """Be the script, without the part."""
    if len(sys.argv) < 3 or sys.argv[1] not in PARTS:
        raise UsageError("name a part and a script: " + ", ".join(PARTS))
    part, *sys.argv = sys.argv[1:]
    with patch(*PARTS[part]):
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    exit_with(main)
