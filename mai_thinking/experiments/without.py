"""A script without one part of asynchronous RL (MAI-Thinking-1 report §3.6), to see what that part is for:
`python -m mai_thinking.experiments.without PART SCRIPT [ARGUMENT …]`.

`pacing`: workers generate without a pause, and what has become too old is thrown away. `ratio`: the denominator of a
token's ratio is its log-probability under the weights that are about to learn from it, not under those that wrote it,
so that every ratio is 1 and no clip ever acts. Neither is a choice that a config offers.
"""

import runpy
import sys
from typing import Any

from torch import Tensor

from mai_thinking.config.command import exit_with
from mai_thinking.errors import UsageError
from mai_thinking.rl import policy
from mai_thinking.rl.asynchronous import Ahead
from mai_thinking.rl.objective import grpo_loss

PARTS = ("pacing", "ratio")


def take_out(part: str) -> None:
    """Of this process. UsageError for another part."""
    if part not in PARTS:
        raise UsageError(f"{part}: no such part; name one of {', '.join(PARTS)}")
    if part == "pacing":
        Ahead.in_time = lambda self, groups: True  # type: ignore[method-assign]
        return

    def without(logprobs: Tensor, old_logprobs: Tensor, *rest: Any, **settings: Any) -> Any:
        return grpo_loss(logprobs, logprobs.detach(), *rest, **settings)

    policy.grpo_loss = without


def main() -> None:
    """Take the part out, and be the script."""
    if len(sys.argv) < 3:
        raise UsageError("name a part and a script: " + ", ".join(PARTS))
    take_out(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    exit_with(main)
