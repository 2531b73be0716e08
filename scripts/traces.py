"""Read what a model wrote during RL: `python scripts/traces.py RUN [--step N] [--best K | --worst K | --longest K]`.

RUN is an RL run's output_dir, finished or running. Without a choice, the three newest rollouts.
"""

from pathlib import Path

from rich.console import Console

from mai_thinking.config.base import Count, Whole
from mai_thinking.config.command import Parser, exit_with, option
from mai_thinking.rl.trace_report import Ranking, report_traces

ORDERS: dict[Ranking, str] = {
    "best": "highest reward",
    "worst": "lowest reward",
    "longest": "most response tokens",
    "newest": "last generated",
}


def main() -> None:
    """Parse the command line and print."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run's output_dir, such as runs/nano-grpo")
    parser.add_argument(
        "--step", type=option(Whole), metavar="N", help="only rollouts generated after N gradient steps"
    )
    parser.add_argument("--task", help="only rollouts of this task")
    order = parser.add_mutually_exclusive_group()
    for name, meaning in ORDERS.items():
        order.add_argument(f"--{name}", type=option(Count), metavar="K", help=f"K rollouts: {meaning}")
    options = parser.parse_args()
    chosen = [(name, getattr(options, name)) for name in ORDERS]
    name, count = next(((name, count) for name, count in chosen if count is not None), ("newest", 3))
    report_traces(options.run, name, count, Console(), step=options.step, task=options.task)


if __name__ == "__main__":
    exit_with(main)
