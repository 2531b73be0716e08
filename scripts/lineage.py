"""Where weights or traces came from: `python scripts/lineage.py PATH` draws the tree back to random weights and checks
every hash in it.

PATH is a run's folder, a model folder, a checkpoint or a folder of traces. Exit code 1 if a file is not as it was
recorded, or has no record.
"""

from pathlib import Path

from rich.console import Console

from mai_thinking.config.command import EXIT_FAILED, Parser, exit_with
from mai_thinking.report.lineage import report


def main() -> int:
    """Parse the command line and report."""
    parser = Parser(__doc__)
    parser.add_argument("path", type=Path, nargs="?", default=Path("runs/nano"), help="default: runs/nano")
    return 0 if report(parser.parse_args().path.expanduser(), Console()) else EXIT_FAILED


if __name__ == "__main__":
    exit_with(main)
