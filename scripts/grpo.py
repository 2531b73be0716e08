"""Climb by reinforcement learning: `python scripts/grpo.py CONFIG.yaml [key.path=value …] [--dry-run]`."""

from mai_thinking.config.command import exit_with, parse_run_command
from mai_thinking.config.grpo import GrpoConfig


def main() -> int:
    """Parse, build, run."""
    config, dry_run = parse_run_command(GrpoConfig, "configs/nano-grpo.yaml", __doc__ or "")
    from mai_thinking.recipes.grpo import grpo  # after the config, so that a mistake in it is told at once

    if dry_run:
        return grpo(config, dry_run=True)
    from mai_thinking.report import conclude

    return conclude(grpo(config), config.folder)


if __name__ == "__main__":
    exit_with(main)
