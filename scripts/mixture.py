"""A mixture that is found, not guessed: `python scripts/mixture.py CONFIG.yaml [key.path=value …] [--dry-run]`.

Small models on mixtures sampled around a start, a regression of score on mixture, a proposal, and finals of it, of the
start and of random search. The same command goes on where it was; several such processes share the work.
"""

from mai_thinking.config.command import exit_with, parse_run_command
from mai_thinking.config.mixture import MixtureConfig


def main() -> int:
    """Parse, build, run."""
    config, dry_run = parse_run_command(MixtureConfig, "configs/nano-mixture.yaml", __doc__ or "")
    from mai_thinking.experiments.mixture import run_mixture  # after the config, so that a mistake is told at once
    from mai_thinking.report.mixture import write_report

    return run_mixture(config, dry_run=dry_run, report=write_report)


if __name__ == "__main__":
    exit_with(main)
