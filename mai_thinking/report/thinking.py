"""Did an RL run learn to think, and did it pay? Read from run folders: one run a seed.

The numbers are those of the first and the last evaluation: how a policy does with its own thought, with none, with that
of another problem and with half of its own; how often and how long it thinks; how it does beyond the sizes of its text.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mai_thinking.config.storage import atomic_file
from mai_thinking.errors import UsageError
from mai_thinking.training.metrics import Record, read_records
from mai_thinking.training.report import fenced, pyplot, save_figure

SIZE = "pass@1_size/"
CLIMBED = 0.95
"""The climbing part of a run goes from its first evaluation after step 0 to the first that has this share of the best
pass@1 of all. Fixed before any run was looked at."""
_WAYS = (("pass@1", "its own thought"), ("pass@1_half_thought", "half of it"),
         ("pass@1_other_thought", "another problem's"), ("pass@1_emptied", "none"))  # fmt: skip


class ThinkingRun:
    """An RL run's evaluations and steps."""

    def __init__(self, folder: Path, beyond: int) -> None:
        """`beyond`: the least size that counts as beyond the base's text. UsageError if there is no RL run."""
        self.folder, self.beyond = folder, beyond
        records = read_records(folder / "metrics.jsonl")
        self.evaluations = [record for record in records if record.get("kind") == "evaluation"]
        self.steps = [record for record in records if "kind" not in record]
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
            "beyond_before": self._beyond(first),
            "beyond_after": self._beyond(last),
            "limits": limits,
            "limits_passed": len(limits) - 1,
            "worst_passage": self._worst_passage(),
            "r_squared": self._r_squared(),
        }

    def by_size(self, record: Record, prefix: str = SIZE) -> dict[int, float]:
        """Problem size → mean over the tasks of a metric."""
        found: dict[int, list[float]] = {}
        for name, value in record.items():
            if name.startswith(prefix):
                found.setdefault(int(name.rpartition("/")[2]), []).append(value)
        return {size: fmean(values) for size, values in sorted(found.items())}

    def _beyond(self, record: Record) -> float | None:
        values = [value for size, value in self.by_size(record).items() if size >= self.beyond]
        return fmean(values) if values else None

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
        mx, my = fmean(x), fmean(y)
        sxy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
        sxx, syy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
        return sxy * sxy / (sxx * syy)


def write(folders: Sequence[Path], out: Path, beyond: int, sweep: Sequence[float] | None = None) -> None:
    """`summary.md`, `summary.json`, with the `plots` extra `thinking.png`, and each run's config and metrics. The
    runs are seeds, or with `sweep` the runs of these values of p_cot, which get a figure of their own, `sweep.png`."""
    runs = [ThinkingRun(folder, beyond) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    seeds = [run.summary() for run in runs]
    if sweep is not None:
        seeds = [{"p_cot": value, **seed} for value, seed in zip(sweep, seeds, strict=True)]
    with atomic_file(out / "summary.json") as path:
        key = "seeds" if sweep is None else "sweep"
        path.write_text(json.dumps({"beyond": beyond, key: seeds}, indent=1) + "\n")
    figures = ["![pass@1 and length](thinking.png)"] if _draw(runs, out / "thinking.png") else []
    if sweep is not None and _draw_sweep(seeds, out / "sweep.png"):
        figures.insert(0, "![before and after, by p_cot](sweep.png)")
    page = [f"# {out.name}", _table(seeds), *figures, "## The same problems then, midway and now", *_samples(runs[0])]
    with atomic_file(out / "summary.md") as path:
        path.write_text("\n\n".join(page) + "\n")
    for run in runs:
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copyfile(run.folder / name, out / f"{run.folder.name}-{name}")


def _table(seeds: Sequence[dict[str, Any]]) -> str:
    rows = [name for name in seeds[0] if name != "run"]
    lines = ["| | " + " | ".join(seed["run"] for seed in seeds) + " |", "|---|" + "---:|" * len(seeds)]
    for name in rows:
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(_spell(seed[name]) for seed in seeds) + " |")
    return "\n".join(lines)


def _spell(value: Any) -> str:
    if isinstance(value, list):
        return " → ".join(map(str, value))
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _samples(run: ThinkingRun, count: int = 3) -> list[str]:
    """What the run wrote to the same problems at its first, middle and last evaluation."""
    records = read_records(run.folder / "samples.jsonl")
    if not records:
        return []
    chosen = [records[0], records[len(records) // 2], records[-1]]
    largest: dict[str, int] = {}
    for index, sample in enumerate(records[0]["samples"]):
        if sample["task"] not in largest or sample["size"] > records[0]["samples"][largest[sample["task"]]]["size"]:
            largest[sample["task"]] = index
    parts = []
    for index in list(largest.values())[:count]:
        sample = records[0]["samples"][index]
        parts.append(f"**{sample['question']}** (it is {sample['answer']})")
        for record in chosen:
            said = record["samples"][index]
            mark = "right" if said["passed"] else "wrong"
            parts.append(f"step {record['step']} ({mark})\n\n{fenced(said['response'].rstrip())}")
    return parts


def _draw(runs: Sequence[ThinkingRun], path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, grid = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for index, run in enumerate(runs):
        steps = [record["step"] for record in run.evaluations]
        style = {"linewidth": 1.8 if index == 0 else 0.9, "alpha": 1.0 if index == 0 else 0.6}
        for colour, (name, label) in enumerate(_WAYS):
            grid[0, 0].plot(steps, [record[name] for record in run.evaluations], color=f"C{colour}",
                            label=label if index == 0 else None, **style)  # fmt: skip
        grid[0, 1].plot(steps, [record["response_length"] for record in run.evaluations], color="C0",
                        label="mean response" if index == 0 else None, **style)  # fmt: skip
        grid[0, 1].step([record["step"] for record in run.steps], [record["max_length"] for record in run.steps],
                        where="post", color="grey", linestyle="--", label="limit" if index == 0 else None,
                        **style)  # fmt: skip
        grid[1, 0].plot(steps, [record["thought_share"] for record in run.evaluations], color="C0", **style)
    grid[0, 0].set(title="held-out pass@1, by the thought before the answer", ylim=(0, 1), xlabel="gradient step")
    grid[0, 1].set(title="tokens", xlabel="gradient step", yscale="log")
    grid[1, 0].set(title="share of responses with a thought", ylim=(0, 1.02), xlabel="gradient step")
    evaluations = runs[0].evaluations
    for record, shade in zip(
        (evaluations[0], evaluations[len(evaluations) // 2], evaluations[-1]), (0.35, 0.65, 1.0), strict=True
    ):
        sizes = runs[0].by_size(record)
        grid[1, 1].plot(list(sizes), list(sizes.values()), "o-", markersize=3, color="C0", alpha=shade,
                        label=f"step {record['step']}")  # fmt: skip
    grid[1, 1].axvline(runs[0].beyond - 0.5, color="grey", linestyle="--", linewidth=0.8)
    grid[1, 1].set(title="pass@1 by problem size (first seed)", ylim=(0, 1.02), xlabel="items")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    save_figure(figure, path)
    return True


def _draw_sweep(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    plt = pyplot()
    if plt is None:
        return False
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = {"thought_share": "share of responses with a thought", "length": "tokens", "greedy": "greedy pass@1"}
    places = range(len(rows))
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for when, style in (("before", "o--"), ("after", "o-")):
            axes.plot(places, [row[f"{name}_{when}"] for row in rows], style, label=f"{when} RL")
        axes.set(title=title, xlabel="p_cot: share of worked texts", xticks=list(places))
        axes.set_xticklabels([f"{row['p_cot']:g}" for row in rows])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)
    return True
