"""What does a consolidated model keep of its specialists? `python scripts/consolidation.py CONFIG.yaml --specialists
RUN … --students RUN … --out results/nano-consolidated`: pass@1 on the same held-out problems of an RL config's tasks.

A specialist answers those of its own run's tasks, a student (the base may be one) those of all. Writes summary.md and
summary.json, and copies the students' configs.
"""

import shutil
from pathlib import Path
from statistics import fmean

from mai_thinking.config.base import Count
from mai_thinking.config.command import Parser, exit_with, option


def main() -> None:
    """Parse, ask, write."""
    parser = Parser(__doc__)
    parser.add_argument("config", help="an RL run's YAML file, whose tasks are asked")
    parser.add_argument("--specialists", nargs="+", type=Path, required=True, help="folders of RL runs")
    parser.add_argument("--students", nargs="+", type=Path, required=True, help="folders of runs of any kind")
    parser.add_argument("--problems", type=option(Count), default=200, help="of each task (default: 200)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    options = parser.parse_args()

    from mai_thinking.config.grpo import GrpoConfig
    from mai_thinking.config.loading import load_config, read_yaml_with_base
    from mai_thinking.report.consolidation import write_consolidated
    from mai_thinking.rl.evaluation import answers

    config = load_config(GrpoConfig, options.config)
    all_tasks = [task.name for task in config.tasks]
    found = {}
    for run in [*options.specialists, *options.students]:
        own = [task["name"] for task in read_yaml_with_base(run / "config.yaml").get("tasks", ())]
        tasks = [name for name in all_tasks if run in options.students or name in own]
        found[run.name] = answers(config, str(run / "final"), tasks, options.problems)
        shares = {task: fmean(answer.passed for answer in given) for task, given in found[run.name].items()}
        print(run.name, " ".join(f"{task} {share:.3f}" for task, share in shares.items()))
    write_consolidated(found, [run.name for run in options.specialists], options.out)
    for run in options.students:
        shutil.copyfile(run / "config.yaml", options.out / f"{run.name}-config.yaml")
    print(f"{options.out}/summary.md")


if __name__ == "__main__":
    exit_with(main)
