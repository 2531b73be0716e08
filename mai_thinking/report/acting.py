"""Did an RL run learn to call tools where they are needed, and only there? Read from run folders: one run a seed."""

import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from mai_thinking.errors import UsageError
from mai_thinking.report.document import Document, Table
from mai_thinking.report.figures import Figure, Panel, Series
from mai_thinking.report.reading import read_config, read_samples, then_and_now
from mai_thinking.report.summary import tell
from mai_thinking.training.metrics import Record, read_metrics

_LATE = 0.75
"""The calls' quality is the mean over the steps from this share of the run on."""


def write(folders: Sequence[Path], out: Path, needed: Sequence[str]) -> None:
    """`summary.md`, `summary.json`, with the `plots` extra `tools.png`, and each run's config and metrics. `needed`:
    the tasks that cannot be solved without a call; in the others one only costs. UsageError for a run without tools."""
    runs = [read_metrics(folder) for folder in folders]
    for folder, (_, evaluations) in zip(folders, runs, strict=True):
        if not evaluations or "pass@1_tools_off" not in evaluations[0]:
            raise UsageError(f"{folder}: no evaluations of an RL run with tools there; name the output_dir of one")
        if lacking := [task for task in needed if f"pass@1/{task}" not in evaluations[0]]:
            raise UsageError(f"--needed: {folder} has no task {lacking[0]!r}; name some of the run's `tasks`")
    tasks = [name.removeprefix("pass@1/") for name in runs[0][1][0] if name.startswith("pass@1/")]
    unneeded = [task for task in tasks if task not in needed]
    page = Document(out.name)
    seeds = [_seed(folder, *run, needed, unneeded) for folder, run in zip(folders, runs, strict=True)]
    page.facts["seeds"] = seeds
    page.add(f"Tasks that need calls: {', '.join(needed)}; tasks that do not: {', '.join(unneeded)}.")
    names = [name for name in seeds[0] if name != "run"]
    rows = [[name.replace("_", " "), *(seed[name] for seed in seeds)] for name in names]
    page.add(Table(["", *(seed["run"] for seed in seeds)], rows).markdown())
    ends = [[task, *(run[1][place][f"pass@1/{task}"] for run in runs for place in (0, -1))] for task in tasks]
    header = ["held-out pass@1", *(f"{folder.name}, {when}" for folder in folders for when in ("before", "after"))]
    page.add_table("tasks", Table(header, ends))
    page.add_figures([_figure(runs, tasks)])
    page.add(*map(tell, then_and_now(read_samples(folders[0]), shown=4)), heading="The same problems then and now")
    page.facts["made"] = {
        "command": f"python scripts/thinking.py {' '.join(map(str, folders))} --needed {' '.join(needed)} --out {out}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "seeds": [read_config(folder)["seed"] for folder in folders],
    }
    page.write(out)
    for folder in folders:
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copyfile(folder / name, out / f"{folder.name}-{name}")


def _seed(
    folder: Path, steps: Sequence[Record], evaluations: Sequence[Record], needed: Sequence[str], unneeded: Sequence[str]
) -> dict[str, Any]:
    first, last = evaluations[0], evaluations[-1]
    late = [record for record in steps if record["step"] >= _LATE * last["step"]]

    def mean(record: Record, name: str, tasks: Sequence[str]) -> float | None:
        return fmean(record[f"{name}/{task}"] for task in tasks) if tasks else None

    def of_calls(name: str) -> float | None:
        values = [record[name] for record in late if name in record]
        return fmean(values) if values else None

    return {
        "run": folder.name,
        "steps": last["step"],
        "before": mean(first, "pass@1", needed),
        "after": mean(last, "pass@1", needed),
        "tools_off": mean(last, "pass@1_tools_off", needed),
        "calls_needed_before": mean(first, "call_share", needed),
        "calls_needed": mean(last, "call_share", needed),
        "calls_unneeded_before": mean(first, "call_share", unneeded),
        "calls_unneeded": mean(last, "call_share", unneeded),
        "unneeded_before": mean(first, "pass@1", unneeded),
        "unneeded_after": mean(last, "pass@1", unneeded),
        "cache_hits": of_calls("cache_hits"),
        "calls_failed": of_calls("calls_failed"),
        "calls_repeated": of_calls("calls_repeated"),
    }


def _figure(runs: Sequence[tuple[list[Record], list[Record]]], tasks: Sequence[str]) -> Figure:
    """The seeds share a task's colour; their names stand at the first."""
    panels = {"pass@1": "held-out pass@1", "pass@1_tools_off": "the same, tools off", "call_share": "share with a call"}
    return Figure(
        "tools", [_panel(runs, tasks, name, title) for name, title in panels.items()], columns=3, size=(4.5, 4)
    )


def _panel(runs: Sequence[tuple[list[Record], list[Record]]], tasks: Sequence[str], name: str, title: str) -> Panel:
    lines = [
        Series(
            "" if place else task,
            [record["step"] for record in evaluations],
            [record[f"{name}/{task}"] for record in evaluations],
            colour=colour,
        )
        for place, (_, evaluations) in enumerate(runs)
        for colour, task in enumerate(tasks)
    ]
    return Panel(title, lines, span=(0, 1.02))
