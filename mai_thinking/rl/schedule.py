"""What an asynchronous RL run must remember to be the same run again: which batch was begun and which arrived when,
and the batches that arrived, until a checkpoint has what was learned from them.

    rollouts/schedule-00000.jsonl               beginnings and arrivals of rank 0, a line each, in their order
    rollouts/batch-00000012-rank-00000.safetensors
"""

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mai_thinking.config.storage import atomic_file
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.rollout import Group
from mai_thinking.rl.rollout_worker import RolloutBatch
from mai_thinking.rl.traces import Trace
from mai_thinking.training.metrics import Record, read_records
from mai_thinking.training.state import read_tree, write_tree

_FOLDER = "rollouts"


def schedule_path(run: Path, rank: int) -> Path:
    """Of a rank's schedule in a run's folder."""
    return run / _FOLDER / f"schedule-{rank:05d}.jsonl"


class Spool:
    """Answered batches of one rank, on disk: written whole by a worker, read by the collector."""

    def __init__(self, run: Path, rank: int) -> None:
        """In a run's folder."""
        self.folder, self.rank = run / _FOLDER, rank

    def path(self, number: int) -> Path:
        """Of a batch."""
        return self.folder / f"batch-{number:08d}-rank-{self.rank:05d}.safetensors"

    def write(self, batch: RolloutBatch) -> None:
        """Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = vars(batch) | {
            "groups": [group.state_dict() for group in batch.groups],
            "counts": dict(batch.counts),
            "traces": [_converted(trace, torch.tensor) for trace in batch.traces],
        }
        with atomic_file(self.path(batch.number), durable=True) as path:
            write_tree(path, tree)

    def read(self, asked: RolloutBatch) -> RolloutBatch | None:
        """The batch with its answer; None if there is none, a damaged one, or that of an earlier one of this number."""
        try:
            tree = read_tree(self.path(asked.number))
        except (OSError, ValueError, SafetensorError):
            return None
        parts = {
            "groups": [Group.from_state(group) for group in tree["groups"]],
            "counts": FilterCounts(**tree["counts"]),
            "traces": [_converted(trace, torch.Tensor.numpy) for trace in tree["traces"]],
        }
        found = RolloutBatch(**tree | parts)
        return found if found == asked else None

    def discard(self, number: int) -> None:
        """Of a batch that nobody needs again."""
        self.path(number).unlink(missing_ok=True)

    def clear(self) -> None:
        """At the end of the run: the schedule alone makes it again."""
        for path in self.folder.glob("batch-*"):
            path.unlink()


class Schedule:
    """One rank's batches, in the order in which they are begun and arrive, as records:

    {"version": …, "begun": what is asked for} when a batch is begun, and {"version": …, "arrived": its number,
    "weights": [[n, the weights' version that it was written with after n decoding steps], …], …} when it is taken in;
    `version` is that of the learner's weights then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        records = read_records(path)
        torn = path.is_file() and not path.read_bytes().endswith(b"\n")
        self._gap = "\n" if torn else ""  # Before the next line: a machine's death may have cut the last one off
        self._recorded = deque(records)
        self.arrivals = [record for record in records if "arrived" in record]  # On record, and not forgotten

    @property
    def ahead(self) -> bool:
        """Whether there is something on record that has not been done again."""
        return bool(self._recorded)

    def next_of(self, version: int) -> Record | None:
        """What is on record of this version and comes next."""
        while self._recorded and self._recorded[0]["version"] < version:  # a checkpoint has it
            self._recorded.popleft()
        if not self._recorded or self._recorded[0]["version"] > version:
            return None
        return self._recorded.popleft()

    def add_begun(self, version: int, batch: RolloutBatch) -> None:
        """It is about to be."""
        self._append({"version": version, "begun": batch.asked})

    def add_arrival(self, version: int, batch: RolloutBatch) -> None:
        """It is about to be learned from."""
        record: Record = {
            "version": version,
            "arrived": batch.number,
            "weights": [[0, batch.version], *batch.switches],
            "worker": batch.worker,
            "began": round(batch.began, 3),
            "seconds": round(batch.seconds, 3),
            "graded": [[round(begin - batch.began, 3), round(seconds, 3)] for begin, seconds in batch.graded],
        }
        self._append(record)
        self.arrivals.append(record)

    def forget_before(self, version: int) -> list[int]:
        """The numbers of the batches that arrived before `version`, once each."""
        gone = [arrival["arrived"] for arrival in self.arrivals if arrival["version"] < version]
        self.arrivals = [arrival for arrival in self.arrivals if arrival["version"] >= version]
        return gone

    def _append(self, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{self._gap}{json.dumps(record)}\n")
        self._gap = ""


def _converted(trace: Trace, convert: Callable[[Any], Any]) -> Trace:
    """With its arrays as tensors, or back."""
    arrays = {name: convert(trace[name]) for name in ("response_ids", "observed", "logprobs")}
    return trace | arrays
