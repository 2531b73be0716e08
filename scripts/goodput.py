"""Where a run's time went, and what to expect elsewhere.

`python scripts/goodput.py RUN` prints a table and draws RUN/report/goodput.png. `python scripts/goodput.py project RUN`
takes RUN's costs to 8 … 8,192 GPUs; with `--chaos-period S --steps N` it predicts a run like RUN under
`--chaos kill:Ss`.
"""

import sys
from pathlib import Path

from rich.console import Console

from mai_thinking.config.base import Count, Seconds, Weight
from mai_thinking.config.command import Parser, exit_with, option
from mai_thinking.report.goodput import report, report_prediction, report_projection
from mai_thinking.report.projection import FAILURES_PER_GPU_HOUR


def main() -> None:
    """Parse the command line and report."""
    arguments = sys.argv[1:]
    projecting = arguments[:1] == ["project"]
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run's output_dir, such as runs/nano")
    if projecting:
        parser.add_argument("--failures-per-gpu-hour", type=option(Weight), default=FAILURES_PER_GPU_HOUR)
        parser.add_argument(
            "--chaos-period", type=option(Seconds), help="predict a run with one kill in each so many seconds"
        )
        parser.add_argument("--steps", type=option(Count), help="of the predicted run")
    options = parser.parse_args(arguments[projecting:])
    if projecting and (options.chaos_period is None) != (options.steps is None):
        parser.error("--chaos-period and --steps go together: give both")
    if not projecting:
        report(options.run, Console())
    elif options.chaos_period is None:
        report_projection(options.run, options.failures_per_gpu_hour, Console())
    else:
        report_prediction(options.run, options.chaos_period, options.steps, Console())


if __name__ == "__main__":
    exit_with(main)
