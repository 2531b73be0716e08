"""What a run's folder says, read without touching it: the newest whole state, also while the run is being written.

A file that is torn, not there yet or just being replaced counts as not there. Needs no torch.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mai_thinking.errors import UsageError, one_line
from mai_thinking.experiments.plan import INPUTS
from mai_thinking.launch.goodput import Account, account
from mai_thinking.provenance.record import RECORD, Lineage, read_lineage
from mai_thinking.rl.collapse import COLLAPSE, Verdict, read_verdict
from mai_thinking.rl.trace_report import Order, choose
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.training.ledger import RESTART
from mai_thinking.training.metrics import Record, read_metrics, read_records
from mai_thinking.training.run_folder import NOTES, SAMPLES

CHOICES: tuple[tuple[str, Order], ...] = (
    ("Newest", "newest"),
    ("Highest reward", "best"),
    ("Lowest reward", "worst"),
)
SHOWN = 3
"""Rollouts of each choice, of different problems where there are any."""
_LOOKED_AT = 64


@dataclass(frozen=True)
class Run:
    """One training run."""

    path: Path
    config: dict[str, Any]
    kind: str
    status: str
    steps: list[Record]
    """Its training steps, in order."""
    evaluations: list[Record]
    account: Account
    notes: dict[str, Any]
    """What the recipe noted for its page (`RunFolder.note`)."""
    samples: list[Record]
    """A response to each held-out problem at each evaluation (`samples.jsonl`): fields of `rl.evaluation.Sample`, and
    the step."""
    lineage: Lineage | str
    """Of its model, or what it has so far; or why there is none."""
    collapse: Verdict | None

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.name)

    @property
    def steps_done(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def minutes(self) -> float:
        """What it took, without the time in which nobody ran it."""
        return (self.account.wall_clock - self.account.seconds[RESTART]) / 60

    def rollouts(self) -> dict[str, list[dict[str, Any]]]:
        """By choice, rollouts as rows of the trace store; empty for a run without traces."""
        store = TraceStore(self.path / FOLDER)
        found = {}
        for title, order in CHOICES:
            try:
                found[title] = _of_different_problems(choose(store, order, _LOOKED_AT))
            except UsageError:  # none yet, or none whole
                return {}
        return found


@dataclass(frozen=True)
class Climb:
    """A whole climb: runs in a row, below one folder."""

    path: Path
    name: str
    stages: list[Run]
    """Those that have begun, in the climb's order."""

    @property
    def begins(self) -> list[float]:
        """When each stage began, in minutes of work."""
        return [sum(stage.minutes for stage in self.stages[:index]) for index in range(len(self.stages))]


def read(path: Path) -> Run | Climb:
    """The run or the climb in the folder `path`. UsageError if there is neither."""
    names = read_json(path / INPUTS)
    if names is not None:
        stages = []
        for name in names:
            with suppress(UsageError):  # not begun, or being moved aside
                stages.append(read_run(path / name))
        if stages:
            return Climb(path, str(read_config(path).get("name") or path.name), stages)
    if not (path / "config.yaml").is_file() or not (path / "metrics.jsonl").is_file():
        raise UsageError(f"{path}: no run; name a run's output_dir, such as runs/nano, once its first step is done")
    return read_run(path)


def read_run(path: Path) -> Run:
    """The run in the folder `path`, which has a config.yaml and perhaps no more. UsageError for a damaged config."""
    config = read_config(path)
    events = read_records(path / "events.jsonl")
    steps, evaluations = read_metrics(path)
    return Run(
        path=path,
        config=config,
        kind=_kind(config),
        status=_status(path, events),
        steps=steps,
        evaluations=evaluations,
        account=account(events),
        notes=read_json(path / NOTES) or {},
        samples=read_samples(path),
        lineage=_lineage(path),
        collapse=read_verdict(path) if read_json(path / COLLAPSE) else None,
    )


def read_samples(path: Path) -> list[Record]:
    """A response to each held-out problem at each evaluation of the RL run in the folder `path`."""
    records = read_records(path / SAMPLES)
    return [{**sample, "step": record["step"]} for record in records for sample in record["samples"]]


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no whole one."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def then_and_now(samples: Sequence[Record], shown: int = 2) -> list[list[Record]]:
    """Of each task, up to `shown` held-out problems with their responses at the first evaluation, in the middle and at
    the last: those that were learned on the way first, the larger before the smaller."""
    steps = sorted({sample["step"] for sample in samples})
    picked = list(dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))) if steps else []
    by_problem: dict[tuple[str, str], dict[int, Record]] = {}
    for sample in samples:
        by_problem.setdefault((sample["task"], sample["question"]), {}).setdefault(sample["step"], sample)
    stories = [[found[step] for step in picked] for found in by_problem.values() if set(picked) <= set(found)]
    stories.sort(key=lambda story: (story[-1]["passed"] and not story[0]["passed"], story[-1].get("size") or 0))
    kept: dict[str, list[list[Record]]] = {}
    for story in reversed(stories):
        of_task = kept.setdefault(story[0]["task"], [])
        if len(of_task) < shown:
            of_task.append(story)
    return [story for task in sorted(kept) for story in kept[task]]


def read_config(path: Path) -> dict[str, Any]:
    """The config of the run or climb in the folder `path`. UsageError if there is no whole one."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path / 'config.yaml'}: cannot be read: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path / 'config.yaml'}: is not the config of a run")
    return config


def _kind(config: dict[str, Any]) -> str:
    if "tasks" in config:
        return "reinforcement learning"
    return "self-distillation" if "traces" in config else "pre-training"


def _status(path: Path, events: list[Record]) -> str:
    if (path / "final").is_dir():
        return "finished"
    if (path / COLLAPSE).is_file():
        return "collapsed"
    if events and events[-1]["event"] == "end":
        return "stopped on request"
    return "under way, or killed"


def _of_different_problems(traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = {trace["group_id"]: trace for trace in reversed(traces)}
    return list(reversed(first.values()))[:SHOWN]


def _lineage(path: Path) -> Lineage | str:
    """The newest that can be read: a run under way removes its older checkpoints."""
    problem = "nothing here has a record of where it comes from yet"
    checkpoints = sorted((path / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)
    for folder in (path / "final", *checkpoints, path / FOLDER):
        try:
            if (folder / RECORD).is_file():
                return read_lineage(folder)
        except (ValueError, OSError) as error:
            problem = f"{folder}: {error}"
    return problem
