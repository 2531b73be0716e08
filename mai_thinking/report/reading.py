"""What a run's folder says, read without touching it: the newest whole state, also while the run is being written.

A file that is torn, not there yet or just being replaced counts as not there. Needs no torch.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mai_thinking.errors import UsageError, one_line
from mai_thinking.experiments.plan import INPUTS
from mai_thinking.launch.goodput import Account
from mai_thinking.provenance.lineage import RECORD, Lineage, read_lineage
from mai_thinking.rl.collapse import COLLAPSE, read_verdict
from mai_thinking.rl.trace_report import Ranking, choose
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.training.ledger import RESTART
from mai_thinking.training.metrics import Record, read_metrics, read_records
from mai_thinking.training.run_folder import NOTES, SAMPLES

RL = "reinforcement learning"
_CHOICES: dict[str, Ranking] = {"Newest": "newest", "Highest reward": "best", "Lowest reward": "worst"}
_SHOWN, _LOOKED_AT = 3, 64


class Run:
    """One training run."""

    def __init__(self, path: Path) -> None:
        """From a folder that has a config.yaml and perhaps no more. UsageError for a damaged config."""
        self.path, self.config = path, read_config(path)
        self.name = str(self.config.get("name") or path.name)
        self.kind = "self-distillation" if "traces" in self.config else "pre-training"
        if "tasks" in self.config:
            self.kind = RL
        self.steps, self.evaluations = read_metrics(path)
        self.samples = read_samples(path)
        self.events = read_records(path / "events.jsonl")
        self.account = Account(self.events)
        self.notes = read_json(path / NOTES) or {}
        """What the recipe noted for its page (`RunFolder.note`)."""
        self.collapse = read_verdict(path) if read_json(path / COLLAPSE) else None
        self.lineage = _lineage(path)

    @property
    def status(self) -> str:
        """Whether it goes on, and why not."""
        if (self.path / "final").is_dir():
            return "finished"
        if (self.path / COLLAPSE).is_file():
            return "collapsed"
        ended = self.events and self.events[-1]["event"] == "end"
        return "stopped on request" if ended else "under way, or killed"

    @property
    def steps_done(self) -> int:
        """The last step's number."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def minutes(self) -> float:
        """What it took, without the time in which nobody ran it."""
        return (self.account.wall_clock - self.account.seconds[RESTART]) / 60

    def rollouts(self) -> dict[str, list[dict[str, Any]]]:
        """By choice, rows of the trace store, of different problems where there are any; {} for a run without."""
        found = {}
        for title, order in _CHOICES.items():
            try:
                traces = choose(TraceStore(self.path / FOLDER), order, _LOOKED_AT)
            except UsageError:  # none yet, or none whole
                return {}
            first = {trace["group_id"]: trace for trace in reversed(traces)}
            found[title] = list(reversed(first.values()))[:_SHOWN]
        return found


@dataclass(frozen=True)
class Climb:
    """A whole climb: runs in a row, below one folder."""

    path: Path
    name: str
    stages: list[Run]
    """Those that have begun, in the climb's order."""


def read(path: Path) -> Run | Climb:
    """The run or the climb in the folder `path`. UsageError if there is neither."""
    stages = []
    for name in read_json(path / INPUTS) or {}:
        with suppress(UsageError):  # not begun, or being moved aside
            stages.append(Run(path / name))
    if stages:
        return Climb(path, str(read_config(path).get("name") or path.name), stages)
    if not (path / "config.yaml").is_file() or not (path / "metrics.jsonl").is_file():
        raise UsageError(f"{path}: no run; name a run's output_dir, such as runs/nano, once its first step is done")
    return Run(path)


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


def read_config(path: Path) -> dict[str, Any]:
    """The config of the run or climb in the folder `path`. UsageError if there is no whole one."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path / 'config.yaml'}: cannot be read: {one_line(error)}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path / 'config.yaml'}: is not the config of a run")
    return config


def _lineage(path: Path) -> Lineage | str:
    """Of its model, or what it has so far, or why there is none: a run under way removes its older checkpoints."""
    problem = "nothing here has a record of where it comes from yet"
    checkpoints = sorted((path / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True)
    for folder in (path / "final", *checkpoints, path / FOLDER):
        try:
            if (folder / RECORD).is_file():
                return read_lineage(folder)
        except (ValueError, OSError) as error:
            problem = f"{folder}: {error}"
    return problem
