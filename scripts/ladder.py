"""Measure before believing: `python scripts/ladder.py LADDER.yaml [key.path=value …] [--dry-run]`.

Trains what is missing of a ladder, several such processes sharing the work, and says what it shows. `--plan MINUTES`
proposes, from the runs that are there, rungs and seeds that decide the ladder's `difference` in that time, and trains
nothing. `python scripts/ladder.py fit POINTS.json [--baseline NAME] [--output FOLDER]` concludes from runs made by any
program.
"""

import sys
from pathlib import Path

from mai_thinking.config.base import Seconds
from mai_thinking.config.command import Parser, exit_with, option, parse_with_options
from mai_thinking.config.ladder import LadderConfig

DEFAULT = "configs/ladders/interleaved-vs-every-layer.yaml"


def main() -> int:
    """Parse, run or fit."""
    if sys.argv[1:2] == ["fit"]:
        return fit(sys.argv[2:])
    options = {"--plan": {"type": option(Seconds), "metavar": "MINUTES", "help": "propose rungs and seeds, and stop"}}
    ladder, dry_run, given = parse_with_options(LadderConfig, DEFAULT, __doc__ or "", options)
    from mai_thinking.experiments.ladder import plan_ladder, run_ladder  # after the config: its mistakes come at once
    from mai_thinking.report.ladder import write_report

    if given["plan"] is not None:
        print(plan_ladder(ladder, given["plan"]))
        return 0
    return run_ladder(ladder, dry_run=dry_run, report=write_report)


def fit(arguments: list[str]) -> int:
    """Conclude from a file of points."""
    parser = Parser(__doc__, prog="ladder.py fit")
    parser.add_argument("points", type=Path, metavar="POINTS.json")
    parser.add_argument("--baseline", help="the config that the others are measured against (default: the file's)")
    parser.add_argument("--output", type=Path, help="a folder for page, figures and JSON (default: POINTS-report)")
    options = parser.parse_args(arguments)
    from mai_thinking.experiments.scaling.points import read_points
    from mai_thinking.report.ladder import write_report

    points = read_points(options.points, options.baseline)
    output = options.output or options.points.with_name(f"{options.points.stem}-report")
    print(write_report(points, output, options.points.stem))
    return 0


if __name__ == "__main__":
    exit_with(main)
