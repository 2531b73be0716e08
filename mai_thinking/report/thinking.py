"""Did an RL run learn to think, and did it pay? Read from run folders: one run a seed.

The numbers are those of the first and the last evaluation: how a policy does with its own thought, with none, with that
of another problem and with half of its own; how often and how long it thinks; how it does beyond the sizes of its text.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

from mai_thinking.errors import UsageError
from mai_thinking.report.comparison import student
from mai_thinking.report.document import Cell, Document, Table
from mai_thinking.report.figures import Figure, Panel, Series
from mai_thinking.report.panels import THOUGHTS
from mai_thinking.report.reading import read_samples, then_and_now
from mai_thinking.report.summary import tell
from mai_thinking.training.metrics import Record, read_metrics

SIZE = "pass@1_size/"
WAYS = ("with_thought", "other_thought", "half_thought")
CLIMBED = 0.95
"""The climbing part of a run goes from its first evaluation after step 0 to the first that has this share of the best
pass@1 of all. Fixed before any run was looked at."""


class ThinkingRun:
    """An RL run's evaluations and steps."""

    def __init__(self, folder: Path, beyond: Sequence[Path] = ()) -> None:
        """`beyond`: two runs on larger problems than the base's text, one from its base and one from what came of it;
        what they do at first is what was and what is. UsageError if there is no RL run."""
        self.folder = folder
        self._beyond: list[float | None] = [_first_pass(other) for other in beyond] or [None, None]
        self.steps, self.evaluations = read_metrics(folder)
        if not self.evaluations or "thought_share" not in self.evaluations[0]:
            raise UsageError(f"{folder}: no evaluations of an RL run there; name the output_dir of one")

    def summary(self) -> dict[str, Any]:
        """The figures of the first and last evaluation, by plain keys."""
        first, last = self.evaluations[0], self.evaluations[-1]
        limits = list(dict.fromkeys(record["max_length"] for record in self.steps))
        return {
            "run": self.folder.name,
            "steps": last["step"],
            "with_thought": last["pass@1"],
            "emptied": last["pass@1_emptied"],
            "other_thought": last["pass@1_other_thought"],
            "half_thought": last["pass@1_half_thought"],
            "pass_before": first["pass@1"],
            "thought_share_before": first["thought_share"],
            "thought_share_after": last["thought_share"],
            "length_before": first["response_length"],
            "length_after": last["response_length"],
            "greedy_before": first["greedy"],
            "greedy_after": last["greedy"],
            "beyond_before": self._beyond[0],
            "beyond_after": self._beyond[1],
            "limits": limits,
            "limits_passed": len(limits) - 1,
            "worst_passage": self._worst_passage(),
            "r_squared": self._r_squared(),
        }

    def by_size(self, record: Record) -> dict[int, float]:
        """Problem size → pass@1, the mean over the tasks."""
        found: dict[int, list[float]] = {}
        for name, value in record.items():
            if name.startswith(SIZE):
                found.setdefault(int(name.rpartition("/")[2]), []).append(value)
        return {size: fmean(values) for size, values in sorted(found.items())}

    def series(self, field: str, name: str, colour: int) -> Series:
        """A metric of the evaluations."""
        x, y = [record["step"] for record in self.evaluations], [record[field] for record in self.evaluations]
        return Series(name, x, y, colour=colour)

    def _worst_passage(self) -> float:
        """The most pass@1 that any evaluation within 20 steps behind a change of the limit had lost and not
        regained."""
        changes = [
            after["step"]
            for before, after in zip(self.steps, self.steps[1:], strict=False)
            if after["max_length"] != before["max_length"]
        ]
        worst = 0.0
        for change in changes:
            before = [record["pass@1"] for record in self.evaluations if record["step"] < change]
            behind = [record["pass@1"] for record in self.evaluations if change <= record["step"] <= change + 20]
            if before and behind:
                worst = max(worst, before[-1] - max(behind))
        return worst

    def _r_squared(self) -> float | None:
        """R² of pass@1 against log step over the climbing part; None with fewer than three points."""
        later = [record for record in self.evaluations if record["step"] > 0]
        best = max((record["pass@1"] for record in later), default=0.0)
        end = next((index for index, record in enumerate(later) if record["pass@1"] >= CLIMBED * best), 0)
        x = [math.log(record["step"]) for record in later[: end + 1]]
        y = [record["pass@1"] for record in later[: end + 1]]
        if len(x) < 3 or len(set(y)) == 1:
            return None
        return correlation(x, y) ** 2


def write(
    folders: Sequence[Path], out: Path, beyond: Sequence[Path] = (), sweep: Sequence[float] | None = None
) -> None:
    """`summary.md`, `summary.json`, with the `plots` extra `thinking.png`, and each run's config and metrics. The
    runs are seeds, or with `sweep` the runs of these values of p_cot, which get a figure of their own, `sweep.png`."""
    if beyond and len(beyond) != len(folders) + 1:
        raise UsageError(f"--beyond: {len(beyond)} runs; name one from the base, then one from the end of each run")
    larger: list[Sequence[Path]] = [(beyond[0], end) for end in beyond[1:]] or [()] * len(folders)
    runs = [ThinkingRun(folder, both) for folder, both in zip(folders, larger, strict=True)]
    seeds = [run.summary() for run in runs]
    page = Document(out.name)
    if sweep is not None:
        seeds = [{"p_cot": value, **seed} for value, seed in zip(sweep, seeds, strict=True)]
        page.add_figures([_sweep(seeds)])
    page.facts["seeds" if sweep is None else "sweep"] = seeds
    page.add(_table(seeds).markdown())
    if sweep is None:
        worth = {name: student([seed[name] - seed["emptied"] for seed in seeds]) for name in WAYS}
        page.facts["worth"] = {
            name: dict(zip(("effect", "low", "high"), found, strict=True)) for name, found in worth.items()
        }
        rows = [[name.replace("_", " "), *found] for name, found in worth.items()]
        page.add("Less what the emptied thought gives, over seeds, with Student's 95 % interval:")
        page.add(Table(["", "difference", "low", "high"], rows).markdown())
    page.add_figures([_figure(runs)])
    stories = then_and_now(read_samples(folders[0]))
    page.add(*map(tell, stories), heading="The same problems then, midway and now")
    page.write(out)
    for run in runs:
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copyfile(run.folder / name, out / f"{run.folder.name}-{name}")


def _first_pass(folder: Path) -> float:
    """pass@1 before the first step."""
    return float(ThinkingRun(folder).evaluations[0]["pass@1"])


def _table(seeds: Sequence[dict[str, Any]]) -> Table:
    names = [name for name in seeds[0] if name != "run"]
    rows = [[name.replace("_", " "), *(_spell(seed[name]) for seed in seeds)] for name in names]
    return Table(["", *(seed["run"] for seed in seeds)], rows)


def _spell(value: Any) -> Cell:
    if isinstance(value, list):
        return " → ".join(map(str, value))
    return "–" if value is None else value


def _figure(runs: Sequence[ThinkingRun]) -> Figure:
    """The seeds share a colour; their names stand at the first."""
    ways, lengths, shares = list[Series](), list[Series](), list[Series]()
    for place, run in enumerate(runs):
        for colour, (field, title) in enumerate(THOUGHTS.items()):
            ways.append(run.series(field, "" if place else title, colour))
        lengths.append(run.series("response_length", "" if place else "mean response", 0))
        steps, limits = ([record[field] for record in run.steps] for field in ("step", "max_length"))
        lengths.append(Series("" if place else "limit", steps, limits, colour=7))
        shares.append(run.series("thought_share", "", 0))
    marks = runs[0].evaluations
    sizes = []
    for place, record in enumerate((marks[0], marks[len(marks) // 2], marks[-1])):
        by_size = runs[0].by_size(record)
        sizes.append(Series(f"step {record['step']}", list(by_size), list(by_size.values()), shade=place / 2))
    panels = [
        Panel("held-out pass@1, by the thought before the answer", ways, span=(0, 1)),
        Panel("tokens", lengths, log_y=True),
        Panel("share of responses with a thought", shares, span=(0, 1.02)),
        Panel("pass@1 by size (first seed)", sizes, x_name="items", span=(0, 1.02)),
    ]
    return Figure("thinking", panels)


def _sweep(rows: Sequence[dict[str, Any]]) -> Figure:
    titles = {"thought_share": "share of responses with a thought", "length": "tokens", "greedy": "greedy pass@1"}
    panels = []
    for name, title in titles.items():
        ends = {when: [row[f"{name}_{when}"] for row in rows] for when in ("before", "after")}
        lines = [Series(f"{when} RL", range(len(rows)), values) for when, values in ends.items()]
        names = [f"{row['p_cot']:g}" for row in rows]
        panels.append(Panel(title, lines, x_name="p_cot: share of worked texts", names=names))
    return Figure("sweep", panels, columns=3, size=(4.5, 4))
