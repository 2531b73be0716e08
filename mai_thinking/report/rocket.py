"""The page of the proof of asynchronous RL, drawn from what its parts have left beside it: `part-NAME.json`, each with
its own command, code and machine, since they need not be of one day."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mai_thinking.bench.machine import describe
from mai_thinking.config.storage import atomic_file
from mai_thinking.config.table import Table
from mai_thinking.report.document import Document, plain
from mai_thinking.report.figures import save
from mai_thinking.report.reading import Run
from mai_thinking.report.timeline import timeline
from mai_thinking.training.metrics import read_metrics

_TIMELINE = "timeline.png"
_HEADINGS = {
    "learned_by_size": "Pacing and dropping in a real run: of the groups worth learning from, the share learned from",
    "simulated": "Simulated, with the lengths of a run: share of the time that the learner waits, and shares learned",
    "jit": "Just-in-time checkpoints: two ranks, one killed again and again",
    "staleness": "How stale may rollouts be",
}


def write_part(
    out: Path, name: str, found: dict[str, Any], command: str, commits: Sequence[str], seed: int, timed: Path | None
) -> None:
    """Keep what a part found, where the page is drawn from; `exact` of other numbers of workers stays. `commits` of its
    runs' code. Who did what is drawn from the run `timed`."""
    path = out / f"part-{name}.json"
    if path.exists() and name == "exact":
        before = json.loads(path.read_text())["found"]["staleness_0_differences"]
        found["staleness_0_differences"] = before | found["staleness_0_differences"]
    out.mkdir(parents=True, exist_ok=True)
    made = {"command": command, "commits": commits, "seed": seed, **describe()}
    with atomic_file(path) as file:
        file.write_text(json.dumps(plain({"found": found, "made": made}), indent=1) + "\n")
    for figure in timeline(Run(timed)) if timed is not None else ():
        save(figure, out / _TIMELINE)


def draw(out: Path) -> None:
    """`summary.md` and `summary.json` from the parts that are there."""
    parts = {path.stem.removeprefix("part-"): json.loads(path.read_text()) for path in sorted(out.glob("part-*.json"))}
    page = Document("Rocket: generation beside learning")
    page.facts["made"] = {name: part["made"] for name, part in parts.items()}
    found = {name: value for part in parts.values() for name, value in part["found"].items()}
    tables = {name: value for name, value in found.items() if isinstance(value, list)}
    figures = {name: value for name, value in found.items() if name not in tables}
    page.facts |= figures
    page.add(Table(["figure", "value"], [[name, _spell(value)] for name, value in figures.items()]).markdown())
    if (out / _TIMELINE).exists():
        page.add(f"![who did what]({_TIMELINE})")
    for name, rows in tables.items():
        page.add_table(name, Table(list(rows[0]), [list(row.values()) for row in rows]), _HEADINGS[name])
    links = "What these figures say: [results](../../docs/results.md). Staleness arm by arm: "
    page.add(links + "[nano-staleness](../nano-staleness/summary.md).", heading="How it was made")
    lines = []
    for name, part in parts.items():
        made = part["made"]
        commits = ", ".join(commit[:7] for commit in made["commits"])
        lines.append(
            f"- *{name}*: `{made['command']}`; code {commits}; {made['cpu']}, {made['cores']} cores, torch "
            f"{made['torch']}, seed {made['seed']}"
        )
    page.add("\n".join(lines))
    page.write(out)


def staleness(corrected: Path, uncorrected: Path) -> dict[str, Any]:
    """Two studies of rollouts that are n updates old when their turn comes, by arm: with the ratio's denominator of
    when a token was drawn, and without. Means over the seeds that are there; where only some are in both, a row of the
    first is for those alone."""
    first, second = _runs(corrected), _runs(uncorrected)
    rows = []
    for arm in sorted(first.keys() | second.keys()):
        mine, other = first.get(arm, {}), second.get(arm)
        rows.append(_row(arm, "of the weights that wrote the token", mine))
        if other is None:
            continue
        both = {seed: run for seed, run in mine.items() if seed in other}
        if both.keys() != mine.keys():
            rows.append(_row(arm, "the same", both))
        rows.append(_row(arm, "of the weights that learn", other))
    return {"staleness": rows}


def _runs(study: Path) -> dict[int, dict[int, Path]]:
    """By arm and seed, those that are finished."""
    found: dict[int, dict[int, Path]] = {}
    for run in sorted(final.parent for final in study.glob("stale-*-climb-?/final")):
        found.setdefault(int(run.name.split("-")[1]), {})[int(run.name[-1])] = run
    return found


def _row(arm: int, ratio: str, runs: dict[int, Path]) -> dict[str, Any]:
    read = [read_metrics(run) for run in runs.values()]
    steps = [record for records, _ in read for record in records]
    last = [marks[-1]["pass@1"] for _, marks in read]
    row = {"updates_old": arm, "denominator": ratio, "seeds": ", ".join(map(str, sorted(runs)))}
    row |= {"pass@1": fmean(last), "least": min(last), "most": max(last)}
    row |= {"ratio_max": max(record["ratio_max"] for record in steps)}
    names = ("clip_fraction", "outer_clip_fraction", "grad_norm", "entropy")
    return row | {name: fmean(record[name] for record in steps) for name in names}


def _spell(value: Any) -> str:
    match value:
        case dict():
            return ", ".join(f"{name}: {_spell(part)}" for name, part in value.items())
        case float():
            return f"{value:.3f}"
    return str(value)
