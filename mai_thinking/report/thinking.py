"""What an RL run has learned to do before it answers, and whether it pays. Read from run folders: one run a seed.

Thinking: how a policy does with its own thought, with none, with that of another problem and with half of its own; how
often and how long it thinks; how it does beyond the sizes of its text. Acting: whether it calls tools where they are
needed, and only there. The numbers are those of the first and the last evaluation.
"""

import itertools
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

from mai_thinking.bench.machine import describe
from mai_thinking.config.table import Cell, Interval, Table
from mai_thinking.errors import UsageError
from mai_thinking.report.comparison import student
from mai_thinking.report.document import Document
from mai_thinking.report.figures import Figure, Panel, Series, shade
from mai_thinking.report.panels import PASS, by_step, lines, parts_of, thought_panels
from mai_thinking.report.reading import read_config, read_samples
from mai_thinking.report.summary import stories
from mai_thinking.training.metrics import Record, read_metrics

Runs = Sequence[tuple[list[Record], list[Record]]]
"""Steps and evaluations, seed by seed."""
WAYS = ("with_thought", "other_thought", "half_thought")
CLIMBED = 0.95
"""The climbing part of a run goes from its first evaluation after step 0 to the first that has this share of the best
pass@1 of all. Fixed before any run was looked at."""
_LATE = 0.75
"""The calls' quality is the mean over the steps from this share of the run on."""


def write_thinking(
    folders: Sequence[Path], out: Path, beyond: Sequence[Path] = (), sweep: Sequence[float] | None = None
) -> None:
    """`summary.md`, `summary.json`, with the `plots` extra `thinking.png`, and each run's config and metrics.

    The runs are seeds, or with `sweep` the runs of these values of p_cot, of one seed or several, drawn in `sweep.png`
    instead. `beyond`: runs on larger problems than the base's text, one from the base and one from what came of each
    run; what they do at first is what was and what is. UsageError if a folder has no RL run.
    """
    if beyond and len(beyond) != len(folders) + 1:
        raise UsageError(f"--beyond: {len(beyond)} runs; name one from the base, then one from the end of each run")
    runs, larger = _read(folders, "thought_share"), _read(beyond, "thought_share")
    seeds = []
    for place, (folder, run) in enumerate(zip(folders, runs, strict=True)):
        ends = [larger[number][1][0]["pass@1"] for number in (0, place + 1)] if larger else [None, None]
        seeds.append({"run": folder.name, **thinking(*run, *ends)})
    page = Document(out.name)
    if sweep is not None:
        seeds = [{"p_cot": value, **seed} for value, seed in zip(sweep, seeds, strict=True)]
        _add_sweep(page, seeds)
    else:
        _add_seeds(page, "seeds", seeds)
        worth = {name: student([seed[name] - seed["emptied"] for seed in seeds]) for name in WAYS}
        page.facts["worth"] = {
            name: dict(zip(("effect", "low", "high"), found, strict=True)) for name, found in worth.items()
        }
        rows = [[name.replace("_", " "), *found] for name, found in worth.items()]
        page.add("Less what the emptied thought gives, over seeds, with Student's 95 % interval:")
        page.add(Table(["", "difference", "low", "high"], rows).markdown())
        page.add_figures([_thinking_figure(runs)])
    _finish(page, folders, out, "The same problems then, midway and now", shown=2)


def write_acting(folders: Sequence[Path], out: Path, needed: Sequence[str]) -> None:
    """`summary.md`, `summary.json`, with the `plots` extra `tools.png`, and each run's config and metrics. `needed`:
    the tasks that cannot be solved without a call; in the others one only costs. UsageError for a run without tools."""
    runs = _read(folders, "pass@1_tools_off")
    tasks = parts_of(runs[0][1], PASS)
    for folder, (_, evaluations) in zip(folders, runs, strict=True):
        if lacking := [task for task in needed if PASS + task not in evaluations[0]]:
            raise UsageError(f"--needed: {folder} has no task {lacking[0]!r}; name some of the run's `tasks`")
    unneeded = [task for task in tasks if task not in needed]
    page = Document(out.name)
    page.add(f"Tasks that need calls: {', '.join(needed)}; tasks that do not: {', '.join(unneeded)}.")
    seeds = [{"run": f.name, **acting(*run, needed, unneeded)} for f, run in zip(folders, runs, strict=True)]
    _add_seeds(page, "seeds", seeds)
    ends = [[task, *(run[1][place][PASS + task] for run in runs for place in (0, -1))] for task in tasks]
    header = ["held-out pass@1", *(f"{folder.name}, {when}" for folder in folders for when in ("before", "after"))]
    page.add_table("tasks", Table(header, ends))
    marks = [(evaluations, by_step) for _, evaluations in runs]
    titles = {"pass@1": "held-out pass@1", "pass@1_tools_off": "the same, tools off", "call_share": "share with a call"}
    panels = [
        Panel(title, lines(marks, {f"{name}/{task}": task for task in tasks}), span=(0, 1.02))
        for name, title in titles.items()
    ]
    page.add_figures([Figure("tools", panels, columns=3, size=(4.5, 4))])
    _finish(page, folders, out, "The same problems then and now", shown=4)


def thinking(
    steps: Sequence[Record], marks: Sequence[Record], beyond_before: float | None, beyond_after: float | None
) -> dict[str, Any]:
    """What became of a run's thoughts, by plain keys."""
    first, last = marks[0], marks[-1]
    limits = list(dict.fromkeys(record["max_length"] for record in steps))
    fields = {"thought_share": "thought_share", "length": "response_length", "greedy": "greedy"}
    ends = {"before": first, "after": last}
    return {
        "steps": last["step"],
        "with_thought": last["pass@1"],
        **{name: last[f"pass@1_{name}"] for name in ("emptied", "other_thought", "half_thought")},
        "pass_before": first["pass@1"],
        **{f"{name}_{when}": record[field] for name, field in fields.items() for when, record in ends.items()},
        "beyond_before": beyond_before,
        "beyond_after": beyond_after,
        "limits": limits,
        "limits_passed": len(limits) - 1,
        "worst_passage": _worst_passage(steps, marks),
        "r_squared": _r_squared(marks),
    }


def acting(
    steps: Sequence[Record], marks: Sequence[Record], needed: Sequence[str], unneeded: Sequence[str]
) -> dict[str, Any]:
    """What became of a run's calls, by plain keys."""
    first, last = marks[0], marks[-1]

    def mean(record: Record, name: str, tasks: Sequence[str]) -> float | None:
        return fmean(record[f"{name}/{task}"] for task in tasks) if tasks else None

    found = {
        "steps": last["step"],
        "before": mean(first, "pass@1", needed),
        "after": mean(last, "pass@1", needed),
        "tools_off": mean(last, "pass@1_tools_off", needed),
    }
    for kind, tasks in (("needed", needed), ("unneeded", unneeded)):
        found |= {f"calls_{kind}_before": mean(first, "call_share", tasks)}
        found |= {f"calls_{kind}": mean(last, "call_share", tasks)}
    found |= {"unneeded_before": mean(first, "pass@1", unneeded), "unneeded_after": mean(last, "pass@1", unneeded)}
    late = [record for record in steps if record["step"] >= _LATE * last["step"]]
    for name in ("cache_hits", "calls_failed", "calls_repeated"):
        values = [record[name] for record in late if name in record]
        found[name] = fmean(values) if values else None
    return found


def _worst_passage(steps: Sequence[Record], marks: Sequence[Record]) -> float:
    """The most pass@1 that any evaluation within 20 steps behind a change of the limit had lost and not regained."""
    worst = 0.0
    for earlier, later in itertools.pairwise(steps):
        change = later["step"]
        before = [record["pass@1"] for record in marks if record["step"] < change]
        behind = [record["pass@1"] for record in marks if change <= record["step"] <= change + 20]
        if later["max_length"] != earlier["max_length"] and before and behind:
            worst = max(worst, before[-1] - max(behind))
    return worst


def _r_squared(marks: Sequence[Record]) -> float | None:
    """R² of pass@1 against log step over the climbing part; None with fewer than three points."""
    later = [record for record in marks if record["step"] > 0]
    best = max((record["pass@1"] for record in later), default=0.0)
    end = next((index for index, record in enumerate(later) if record["pass@1"] >= CLIMBED * best), 0)
    x = [math.log(record["step"]) for record in later[: end + 1]]
    y = [record["pass@1"] for record in later[: end + 1]]
    return correlation(x, y) ** 2 if len(x) >= 3 and len(set(y)) > 1 else None


def _read(folders: Sequence[Path], field: str) -> Runs:
    runs = [read_metrics(folder) for folder in folders]
    for folder, (_, marks) in zip(folders, runs, strict=True):
        if not marks or field not in marks[0]:
            kind = "an RL run" if field == "thought_share" else "an RL run with tools"
            raise UsageError(f"{folder}: no evaluations of {kind} there; name the output_dir of one")
    return runs


def _add_seeds(page: Document, key: str, seeds: Sequence[dict[str, Any]]) -> None:
    """A column a run."""
    page.facts[key] = seeds
    names = [name for name in seeds[0] if name != "run"]
    rows = [[name.replace("_", " "), *(_spell(seed[name]) for seed in seeds)] for name in names]
    page.add(Table(["", *(seed["run"] for seed in seeds)], rows).markdown())


def _spell(value: Any) -> Cell:
    if isinstance(value, list):
        return " → ".join(map(str, value))
    return "–" if value is None else value


def _finish(page: Document, folders: Sequence[Path], out: Path, heading: str, shown: int) -> None:
    page.add(*stories(read_samples(folders[0]), shown), heading=heading)
    seeds = [read_config(folder).get("seed") for folder in folders]
    page.facts["made"] = {"command": "python " + shlex.join(sys.argv), "seeds": seeds, **describe()}
    page.write(out)
    for folder in folders:
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copyfile(folder / name, out / f"{folder.name}-{name}")


def _thinking_figure(runs: Runs) -> Figure:
    steps, marks = ([(records[place], by_step) for records in runs] for place in (0, 1))
    tokens = lines(marks, {"response_length": "mean response"}) + lines(steps, {"max_length": "limit"}, [7])
    first, sizes = runs[0][1], []
    for place, record in enumerate((first[0], first[len(first) // 2], first[-1])):
        found: dict[int, list[float]] = {}  # by size, of each task
        for part in parts_of([record], "pass@1_size/"):
            found.setdefault(int(part.rpartition("/")[2]), []).append(record[f"pass@1_size/{part}"])
        values = [fmean(found[size]) for size in sorted(found)]
        sizes.append(Series(f"step {record['step']}", sorted(found), values, colour=shade(place, 3)))
    by_thought, shares = thought_panels([records for records, _ in marks])[:2]
    by_size = Panel("pass@1 by size (first seed)", sizes, x_name="items", span=(0, 1.02))
    return Figure("thinking", [by_thought, Panel("tokens", tokens, log_y=True), shares, by_size])


def _add_sweep(page: Document, runs: Sequence[dict[str, Any]]) -> None:
    """A row and a place in the figure for each p_cot: mean (least–most) over its seeds."""
    page.facts["sweep"] = runs
    values = sorted({run["p_cot"] for run in runs})
    by_value = [[run for run in runs if run["p_cot"] == value] for value in values]
    titles = {"thought_share": "share of responses with a thought", "length": "tokens", "greedy": "greedy pass@1"}
    found = {
        f"{name}_{when}": [_spread([run[f"{name}_{when}"] for run in alike]) for alike in by_value]
        for name in titles
        for when in ("before", "after")
    }
    panels = []
    for name, title in titles.items():
        told = []
        for when in ("before", "after"):
            means, low, high = zip(*found[f"{name}_{when}"], strict=True)
            told.append(Series(f"{when} RL", range(len(values)), means, low, high))
        names = [f"{value:g}" for value in values]
        panels.append(Panel(title, told, x_name="p_cot: share of worked texts", names=names))
    page.add_figures([Figure("sweep", panels, columns=3, size=(4.5, 4))])
    rows = [[f"{value:g}", *cells] for value, *cells in zip(values, *found.values(), strict=True)]
    page.add("Mean (least–most) over seeds:")
    page.add(Table(["p_cot", *(name.replace("_", " ") for name in found)], rows).markdown())


def _spread(values: Sequence[float]) -> Interval:
    return Interval(fmean(values), min(values), max(values))
