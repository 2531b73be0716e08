"""What an asynchronous climb must remember to be the same climb again: which batch was begun and which arrived when,
and the batches that arrived, until a checkpoint has what was learned from them.

    rollouts/schedule-00000.jsonl               orders and arrivals of rank 0, a line each, in their order
    rollouts/batch-00000012-rank-00000.safetensors
"""

import json
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from mai_thinking.config.storage import atomic_file
from mai_thinking.errors import UsageError
from mai_thinking.rl.buffer import pack_group, unpack_group
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.rollout_worker import Batch, Order
from mai_thinking.training.metrics import read_records
from mai_thinking.training.state import read_tree, write_tree

_FOLDER = "rollouts"
_TIMES = ("worker", "began", "seconds", "graded")
_ARRAYS = ("response_ids", "observed", "logprobs")
"""Columns of a trace that are arrays."""


def schedule_path(run: Path, rank: int) -> Path:
    """Of a rank's schedule in a run's folder."""
    return run / _FOLDER / f"schedule-{rank:05d}.jsonl"


class Spool:
    """Answered batches of one rank, on disk: written whole by a worker, read by the controller."""

    def __init__(self, run: Path, rank: int) -> None:
        """In a run's folder."""
        self.folder, self.rank = run / _FOLDER, rank

    def path(self, number: int) -> Path:
        """Of a batch."""
        return self.folder / f"batch-{number:08d}-rank-{self.rank:05d}.safetensors"

    def write(self, batch: Batch) -> None:
        """Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = {
            "order": asdict(batch.order),
            "version": batch.version,
            "groups": [pack_group(group) for group in batch.groups],
            "counts": asdict(batch.counts),
            "traces": [_with_tensors(trace) for trace in batch.traces],
            "switches": batch.switches,
            "times": {name: getattr(batch, name) for name in _TIMES},
        }
        with atomic_file(self.path(batch.order.number), durable=True) as path:
            write_tree(path, tree)

    def read(self, order: Order) -> Batch | None:
        """The answer to the order; None if there is none, a damaged one, or that to an earlier order of this number."""
        try:
            tree = read_tree(self.path(order.number))
        except (OSError, ValueError, SafetensorError):
            return None
        if tree["order"] != asdict(order):
            return None
        return Batch(
            order,
            tree["version"],
            [unpack_group(group) for group in tree["groups"]],
            FilterCounts(**tree["counts"]),
            [_with_arrays(trace) for trace in tree["traces"]],
            tree["switches"],
            **tree["times"],
        )

    def discard(self, number: int) -> None:
        """Of a batch that nobody needs again."""
        self.path(number).unlink(missing_ok=True)

    def clear(self) -> None:
        """At the end of the run: the schedule alone makes it again."""
        for path in self.folder.glob("batch-*"):
            path.unlink()


class Arrival(NamedTuple):
    """That a batch was taken in."""

    version: int
    """Of the learner's weights then."""
    number: int
    weights: list[tuple[int, int]]
    """(n, version): the weights that the batch was written with after n decoding steps."""


class Schedule:
    """One rank's orders and arrivals, in their order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        records = read_records(path)
        torn = path.is_file() and not path.read_bytes().endswith(b"\n")
        self._gap = "\n" if torn else ""
        """Before the next line: a machine's death may have cut the last one off."""
        self._recorded = deque(records)
        self.arrivals = [_arrival(record) for record in records if "arrived" in record]
        """On record, and not forgotten."""

    @property
    def ahead(self) -> bool:
        """Whether there is something on record that has not been done again."""
        return bool(self._recorded)

    def next_of(self, version: int) -> Order | Arrival | None:
        """What is on record of this version and comes next."""
        while self._recorded and self._recorded[0]["version"] < version:  # a checkpoint has it
            self._recorded.popleft()
        if not self._recorded or self._recorded[0]["version"] > version:
            return None
        record = self._recorded.popleft()
        return Order(**record["order"]) if "order" in record else _arrival(record)

    def add_order(self, version: int, order: Order) -> None:
        """It is about to be begun."""
        self._append({"version": version, "order": asdict(order)})

    def add_arrival(self, version: int, batch: Batch) -> None:
        """It is about to be learned from."""
        arrival = Arrival(version, batch.order.number, [(0, batch.version), *batch.switches])
        record = {"version": version, "arrived": arrival.number, "weights": arrival.weights}
        times = {"began": round(batch.began, 3), "seconds": round(batch.seconds, 3)}
        graded = [[round(begin - batch.began, 3), round(seconds, 3)] for begin, seconds in batch.graded]
        self._append(record | {"worker": batch.worker, **times, "graded": graded})
        self.arrivals.append(arrival)

    def forget_before(self, version: int) -> list[int]:
        """The numbers of the batches that arrived before `version`, once each."""
        gone = [arrival.number for arrival in self.arrivals if arrival.version < version]
        self.arrivals = [arrival for arrival in self.arrivals if arrival.version >= version]
        return gone

    def _append(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{self._gap}{json.dumps(record)}\n")
        self._gap = ""


def recorded_schedule(run: str, rank: int) -> Schedule:
    """UsageError if there is none."""
    path = schedule_path(Path(run), rank)
    if not path.exists():
        raise UsageError(f"rollouts.replay: {path} does not exist; name the folder of a run with rollouts.workers")
    return Schedule(path)


def _arrival(record: dict[str, Any]) -> Arrival:
    return Arrival(record["version"], record["arrived"], [(steps, version) for steps, version in record["weights"]])


def _with_tensors(trace: dict[str, Any]) -> dict[str, Any]:
    return trace | {name: torch.from_numpy(trace[name]) for name in _ARRAYS if name in trace}


def _with_arrays(trace: dict[str, Any]) -> dict[str, Any]:
    return trace | {name: trace[name].numpy() for name in _ARRAYS if name in trace}
