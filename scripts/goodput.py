"""Where a run's time went: `python scripts/goodput.py RUN` prints a table and draws RUN/report/goodput.png."""

import argparse
from pathlib import Path

from rich.console import Console

from mai_thinking.config.command import exit_with
from mai_thinking.training.goodput_report import report


def main() -> None:
    """Parse the command line and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's output_dir, such as runs/nano")
    options = parser.parse_args()
    report(options.run, Console())


if __name__ == "__main__":
    exit_with(main)
