"""Is generation beside learning exact, does it lose nothing, and what does it save? `python scripts/rocket.py CONFIG
[key.path=value …] --out results/rocket --work runs/rocket --parts exact faults …`: the proof of `rollouts.workers`, on
any RL config.

Each part is a few runs of scripts/grpo.py, of which one that is finished is not done again. It leaves a file of its own
in the folder `--out`; summary.md and summary.json are drawn from all that are there.
"""

import shlex
import sys
from pathlib import Path

from mai_thinking.config.base import Count
from mai_thinking.config.command import Parser, exit_with, option


def main() -> None:
    """Parse, run, write."""
    parser = Parser(__doc__)
    parser.add_argument("config", help="an RL run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the file's")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--work", type=Path, required=True, help="the folder for the runs")
    parts = ["exact", "time", "simulated", "faults", "deaths", "shares", "jit", "staleness"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:-1], help="what to show")
    parser.add_argument("--updates", type=option(Count), default=50, help="of each run (default: 50)")
    parser.add_argument("--workers", type=option(Count), nargs="+", default=[1, 2, 3], help="of `exact`")
    parser.add_argument("--blocks", type=option(Count), default=4, help="in which runs take turns to be timed")
    parser.add_argument(
        "--kills", type=option(Count), default=50, help="of `faults`; half of them of `deaths`, a tenth of `jit`"
    )
    parser.add_argument("--max-staleness", type=option(Count), default=2, help="where workers are ahead")
    parser.add_argument("--lengths", type=Path, help="an RL run whose responses' lengths are simulated with")
    parser.add_argument("--studies", type=Path, nargs=2, help="of `staleness`: of nano-staleness, and without ratio")
    options = parser.parse_intermixed_args()
    if "staleness" in options.parts and options.studies is None:
        parser.error("--parts staleness wants --studies")

    from mai_thinking.experiments.climb_run import commits_of
    from mai_thinking.experiments.rocket import Proof
    from mai_thinking.report.rocket import draw, staleness, write_part

    proof = Proof(options.config, options.overrides, options.work, options.updates, options.max_staleness)
    ways = {
        "exact": lambda: proof.exact(options.workers),
        "time": lambda: proof.time(options.blocks),
        "simulated": lambda: proof.simulated(options.lengths),
        "faults": lambda: proof.faults(options.kills),
        "deaths": lambda: proof.deaths(options.kills // 2, options.blocks),
        "shares": proof.shares,
        "jit": lambda: proof.jit(options.kills // 10),
        "staleness": lambda: staleness(*options.studies),
    }
    command = "python " + shlex.join(sys.argv)
    for part in options.parts:
        found = ways[part]()
        runs = [run.folder for run in proof.runs]
        if part == "staleness":
            runs = [final.parent for study in options.studies for final in study.glob("stale-*/final")]
        timed = options.work / "time-1" if part == "time" else None
        write_part(options.out, part, found, command, commits_of(runs), proof.config.seed, timed)
        proof.runs.clear()
    draw(options.out)
    print(f"{options.out}/summary.md")


if __name__ == "__main__":
    exit_with(main)
