"""What a climb leaves for people: figures and one Markdown page in `report/`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.storage import atomic_file
from mai_thinking.rl.rollout import Rollout
from mai_thinking.training.metrics import Record, read_records
from mai_thinking.training.report import fenced, pyplot, save_figure, smooth
from mai_thinking.training.run_folder import RunFolder

PASS = "pass@1/"


def write_report(
    folder: RunFolder, config: GrpoConfig, evaluation: Mapping[str, Any], samples: Sequence[Rollout]
) -> None:
    """`summary.md`, and with the `plots` extra `climb.png` and `training.png`."""
    folder.report.mkdir(exist_ok=True)
    records = read_records(folder.metrics)
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    figures = draw(folder.report, records, config)
    page = "\n\n".join(
        [
            f"# {config.name}",
            f"{evaluation['step']:,} steps of {config.groups_per_step} groups of {config.sampling.full_size} rollouts, "
            f"from `{config.init_from}`.",
            "## Held-out problems\n\n" + pass_table(evaluations[0], evaluation),
            *(f"![{name}]({name}.png)" for name in figures),
            "## Samples\n\n" + "\n\n".join(_show(sample) for sample in samples),
        ]
    )
    with atomic_file(folder.report / "summary.md") as path:
        path.write_text(page + "\n")


def pass_table(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """pass@1 with its 95 % interval before and after, and pass@k after, by task, in Markdown."""
    tasks = [name.removeprefix(PASS) for name in last if name.startswith(PASS)]
    (k,) = {name for name in last if re.fullmatch(r"pass@\d+", name)} - {"pass@1"} or {"pass@1"}
    lines = [f"| task | pass@1 before | pass@1 after | {k} after |", "|---|---:|---:|---:|"]
    for task in tasks:
        lines.append(
            f"| {task} | {_with_interval(first, task)} | {_with_interval(last, task)} | {last[f'{k}/{task}']:.3f} |"
        )
    return "\n".join(lines)


def _with_interval(record: Mapping[str, Any], task: str) -> str:
    low, high = record[f"pass@1_low/{task}"], record[f"pass@1_high/{task}"]
    return f"{record[PASS + task]:.3f} ({low:.3f}–{high:.3f})"


def draw(report: Path, records: Sequence[Record], config: GrpoConfig) -> list[str]:
    """The run's figures as PNG; returns their names, none without matplotlib."""
    plt = pyplot()
    if plt is None:
        return []
    _draw_climb(plt, report / "climb.png", [record for record in records if record.get("kind") == "evaluation"])
    _draw_training(plt, report / "training.png", [record for record in records if "kind" not in record], config)
    return ["climb", "training"]


def _draw_climb(plt: Any, path: Path, evaluations: Sequence[Record]) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = [record["step"] for record in evaluations]
    for index, name in enumerate(name for name in evaluations[-1] if name.startswith(PASS)):
        task = name.removeprefix(PASS)
        axes.plot(steps, [record[name] for record in evaluations], "o-", markersize=3, color=f"C{index}", label=task)
        low, high = ([record[f"pass@1_{end}/{task}"] for record in evaluations] for end in ("low", "high"))
        axes.fill_between(steps, low, high, color=f"C{index}", alpha=0.15)
    axes.set(xlabel="gradient step", ylabel="held-out pass@1", ylim=(0, 1), title="the climb, with 95 % intervals")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _draw_training(plt: Any, path: Path, steps: Sequence[Record], config: GrpoConfig) -> None:
    figure, grid = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    panels = (
        ("pass_rate", "pass rate of the groups learned from"),
        ("entropy", "entropy Ĥ (nats per token)"),
        ("clip_relaxation", "k, the trust region's relaxation"),
        ("response_length", "response length (tokens)"),
        ("grad_norm", "gradient norm"),
        ("reward", "reward"),
    )
    for axes, (name, title) in zip(grid.flat, panels, strict=True):
        values = [record[name] for record in steps]
        numbers = [record["step"] for record in steps]
        axes.plot(numbers, values, linewidth=0.5, alpha=0.5, color="tab:blue")
        axes.plot(numbers, smooth(values, keep=0.8), color="tab:blue")
        axes.set(title=title, xlabel="gradient step")
        axes.grid(alpha=0.3)
    grid[0, 1].axhline(config.objective.target_entropy, color="grey", linestyle="--", linewidth=0.8)
    grid[1, 1].set_yscale("log")
    save_figure(figure, path)


def _show(sample: Rollout) -> str:
    problem = sample.problem
    mark = "right" if sample.grade.passed else f"wrong: it is {problem.answer}"
    return f"**{problem.question}** ({problem.task}; {mark})\n\n{fenced(sample.text)}"
