"""Train on traces of a climb: `python scripts/self_distill.py CONFIG.yaml [key.path=value …] [--dry-run]`."""

from mai_thinking.config.command import exit_with, parse_run_command
from mai_thinking.config.distillation import DistillConfig


def main() -> int:
    """Parse, build, run."""
    config, dry_run = parse_run_command(DistillConfig, "configs/nano-distill.yaml", __doc__ or "")
    from mai_thinking.recipes.distill import self_distill  # after the config, so that a mistake in it is told at once

    if dry_run:
        return self_distill(config, dry_run=True)
    from mai_thinking.report import conclude

    return conclude(self_distill(config), config.folder)


if __name__ == "__main__":
    exit_with(main)
