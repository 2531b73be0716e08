"""Did it learn to think, or to call tools? `python scripts/thinking.py RUN [RUN …] --out results/NAME`: one RL run a
seed.

Writes summary.md, summary.json and a figure: pass@1 with the own thought and without, length, share of thoughts, by
size; with `--needed` pass@1 with tools and without, and how often they are called."""

from pathlib import Path

from mai_thinking.config.base import Share
from mai_thinking.config.command import Parser, exit_with, option


def main() -> None:
    """Parse, read, write."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of RL runs that differ in their seed alone")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--p-cot", type=option(Share), nargs="+", help="the runs are of these p_cot, one each")
    parser.add_argument(
        "--beyond", type=Path, nargs="+", default=[], help="runs on larger problems: from the base, from each run's end"
    )
    parser.add_argument("--needed", nargs="+", metavar="TASK", help="runs with tools: the tasks that need a call")
    options = parser.parse_args()

    from mai_thinking.report.thinking import write_acting, write_thinking

    if options.needed:
        write_acting(options.runs, options.out, options.needed)
    else:
        write_thinking(options.runs, options.out, options.beyond, options.p_cot)
    print(f"{options.out}/summary.md")


if __name__ == "__main__":
    exit_with(main)
