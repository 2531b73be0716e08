"""Pre-train or mid-train: `python scripts/pretrain.py CONFIG.yaml [key.path=value …] [--dry-run]`."""

from mai_thinking.config.command import exit_with, parse_run_command
from mai_thinking.config.pretraining import PretrainConfig


def main() -> int:
    """Parse, build, run."""
    config, dry_run = parse_run_command(PretrainConfig, "configs/nano.yaml", __doc__ or "")
    from mai_thinking.recipes.pretrain import pretrain  # after the config, so that a mistake in it is told at once

    if dry_run:
        return pretrain(config, dry_run=True)
    from mai_thinking.report import conclude

    return conclude(pretrain(config), config.folder)


if __name__ == "__main__":
    exit_with(main)
