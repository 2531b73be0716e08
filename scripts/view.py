"""A page to look at: `python scripts/view.py RUN [--output PAGE.html]`.

RUN is the output_dir of a run or of a whole climb, finished or under way. The page is one file that fetches nothing:
curves, expert load over time, sample responses with their rewards by part, where the time went, and the lineage. It is
written to RUN/report/view.html, or where --output says.
"""

from pathlib import Path

from mai_thinking.config.command import Parser, exit_with
from mai_thinking.report import write_page


def main() -> None:
    """Parse the command line and write."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="an output_dir, such as runs/nano-grpo")
    parser.add_argument("--output", type=Path, metavar="PAGE.html", help="default: RUN/report/view.html")
    options = parser.parse_args()
    target = options.output or options.run / "report" / "view.html"
    write_page(options.run, target)
    print(f"page: {target}")


if __name__ == "__main__":
    exit_with(main)
