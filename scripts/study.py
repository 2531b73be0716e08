"""Choices compared over seeds, in one command: `python scripts/study.py CONFIG.yaml [key.path=value …] [--dry-run]`.

The same command goes on where it was; started several times, its processes share the work. `--dry-run` shows the plan,
its state and the time that it will take.
"""

from mai_thinking.config.command import exit_with, parse_run_command
from mai_thinking.config.study import StudyConfig


def main() -> int:
    """Parse, build, run."""
    config, dry_run = parse_run_command(StudyConfig, "configs/nano-findings.yaml", __doc__ or "")
    if dry_run:
        from mai_thinking.experiments.plan import ClimbPlan

        print(ClimbPlan(config.as_climb()).text())
        return 0
    from mai_thinking.experiments.climb import run_climb  # after the config, so that a mistake in it is told at once
    from mai_thinking.report import write_summary
    from mai_thinking.report.study import write_report

    return run_climb(config.as_climb(), report=lambda plan: write_report(config, plan), report_stage=write_summary)


if __name__ == "__main__":
    exit_with(main)
