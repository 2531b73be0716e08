"""Runs side by side: `python scripts/compare.py OUT.png --metrics pass@1,entropy LABEL=RUN,RUN,RUN [LABEL=RUN …]`.

A figure with a panel a metric, each label's runs as their mean and span, and a table of the last values.
"""

from pathlib import Path

from mai_thinking.config.command import Parser, exit_with


def main() -> None:
    """Parse, draw, print."""
    parser = Parser(__doc__)
    parser.add_argument("figure", type=Path, metavar="OUT.png")
    parser.add_argument("--metrics", required=True, help="fields of metrics.jsonl, separated by commas")
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN,RUN", help="runs of one kind, such as several seeds")
    options = parser.parse_args()
    from mai_thinking.report.comparison import compare, parse_groups

    print(compare(parse_groups(options.runs), options.metrics.split(","), options.figure))


if __name__ == "__main__":
    exit_with(main)
