"""Is generation beside learning exact, does it lose nothing, and what does it save? `python scripts/rocket.py CONFIG
[key.path=value …] --out results/rocket --work runs/rocket`: the proof of `rollouts.workers`, on any RL config.

Writes summary.md and summary.json. Each part is a few runs of scripts/grpo.py; one that is finished is not done again.
"""

from pathlib import Path

from mai_thinking.config.base import Count, Whole
from mai_thinking.config.command import Parser, exit_with, option


def main() -> None:
    """Parse, run, write."""
    parser = Parser(__doc__)
    parser.add_argument("config", help="an RL run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the file's")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--work", type=Path, required=True, help="the folder for the runs")
    parser.add_argument("--updates", type=option(Count), default=50, help="of each run (default: 50)")
    parser.add_argument("--exact", type=option(Count), nargs="*", default=[1, 2, 3], help="workers, with nothing stale")
    parser.add_argument("--blocks", type=option(Whole), default=4, help="in which runs take turns to be timed")
    parser.add_argument("--kills", type=option(Whole), default=50, help="of random processes in one run")
    parser.add_argument("--max-staleness", type=option(Count), default=2, help="where workers are ahead")
    parser.add_argument("--traces", type=Path, help="an RL run whose responses' lengths are simulated with")
    options = parser.parse_intermixed_args()

    from mai_thinking.experiments.rocket import Proof

    Proof(options.config, options.overrides, options.work, options.updates, options.max_staleness).write(
        options.out, exact=options.exact, blocks=options.blocks, kills=options.kills, traces=options.traces
    )
    print(f"{options.out}/summary.md")


if __name__ == "__main__":
    exit_with(main)
