"""The whole climb, stage by stage: `python scripts/climb.py CONFIG.yaml [key.path=value …] [--dry-run]`.

The same command goes on where it was, and runs again what has changed; started several times, its processes share the
stages. `--dry-run` shows the plan, its state and the time that it will take.
"""

from mai_thinking.config.climb import ClimbConfig
from mai_thinking.config.command import exit_with, parse_run_command


def main() -> int:
    """Parse, build, run."""
    config, dry_run = parse_run_command(ClimbConfig, "configs/nano-climb.yaml", __doc__ or "")
    if dry_run:
        from mai_thinking.experiments.plan import ClimbPlan

        print(ClimbPlan(config).text())
        return 0
    from mai_thinking.experiments.climb import run_climb  # after the config, so that a mistake in it is told at once
    from mai_thinking.report.summary import write_report, write_summary

    return run_climb(config, report=write_report, report_stage=write_summary)


if __name__ == "__main__":
    exit_with(main)
