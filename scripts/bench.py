"""Measurements that the README quotes: `python scripts/bench.py WHAT [MODEL] [--rounds N] [--json]`."""

from mai_thinking.bench.command import run
from mai_thinking.config.command import exit_with

if __name__ == "__main__":
    exit_with(run)
