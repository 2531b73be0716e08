"""What a page shows of a run, read from its folder while it runs or afterwards."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mai_thinking.errors import UsageError
from mai_thinking.experiments.plan import INPUTS
from mai_thinking.provenance.record import RECORD, Lineage, read_lineage
from mai_thinking.rl.collapse import COLLAPSE, Verdict, read_verdict
from mai_thinking.rl.trace_report import Order, choose
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.training.goodput import Account, account
from mai_thinking.training.metrics import Record, read_records

SAMPLES: tuple[tuple[str, Order], ...] = (
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
    samples: dict[str, list[dict[str, Any]]]
    """By choice, rollouts as rows of the trace store; empty for a run without traces."""
    lineage: Lineage | str
    """Of its model, or what it has so far; or why there is none."""
    collapse: Verdict | None

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.path.name)

    @property
    def steps_done(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0


@dataclass(frozen=True)
class Climb:
    """A whole climb: runs in a row, below one folder."""

    path: Path
    name: str
    stages: list[Run]
    """Those that have begun, in the climb's order."""


def read(path: Path) -> Run | Climb:
    """The run or the climb in the folder `path`. UsageError if there is neither."""
    if (path / INPUTS).is_file():
        names = json.loads((path / INPUTS).read_text())
        stages = [read_run(path / name) for name in names if (path / name / "config.yaml").is_file()]
        if stages:
            config = yaml.safe_load((path / "config.yaml").read_text())
            return Climb(path, str(config.get("name") or path.name), stages)
    if not (path / "config.yaml").is_file() or not (path / "metrics.jsonl").is_file():
        raise UsageError(f"{path}: no run; name a run's output_dir, such as runs/nano, once its first step is done")
    return read_run(path)


def read_run(path: Path) -> Run:
    """The run in the folder `path`, which has a config.yaml and perhaps no more."""
    config = yaml.safe_load((path / "config.yaml").read_text())
    records, events = read_records(path / "metrics.jsonl"), read_records(path / "events.jsonl")
    return Run(
        path=path,
        config=config,
        kind=_kind(config),
        status=_status(path, events),
        steps=[record for record in records if "kind" not in record],
        evaluations=[record for record in records if record.get("kind") == "evaluation"],
        account=account(events),
        samples=_samples(path),
        lineage=_lineage(path),
        collapse=read_verdict(path),
    )


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


def _samples(path: Path) -> dict[str, list[dict[str, Any]]]:
    if not any((path / FOLDER).glob("*.parquet")):
        return {}
    store = TraceStore(path / FOLDER)
    return {title: _of_different_problems(choose(store, order, _LOOKED_AT)) for title, order in SAMPLES}


def _of_different_problems(traces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = {trace["group_id"]: trace for trace in reversed(traces)}
    return list(reversed(first.values()))[:SHOWN]


def _lineage(path: Path) -> Lineage | str:
    checkpoints = sorted((path / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)
    for folder in (path / "final", *checkpoints, path / FOLDER):
        if (folder / RECORD).is_file():
            try:
                return read_lineage(folder)
            except ValueError as error:
                return f"{folder}: {error}"
    return "nothing here has a record of where it comes from yet"
