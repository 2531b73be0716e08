"""The trace store: every rollout of a run, for self-distillation and for the curious.

    traces/batch-00000012-rank-00003.parquet     what rank 3 generated for the run's batch 12 of problems

One Parquet file a batch and rank, written under a temporary name, synchronised to the disk and renamed: under its final
name it is whole, whatever kills the process or fills the disk. A batch that is computed again after a restart must give
the same rollouts, bit for bit, and is not written a second time.
"""

import errno
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mai_thinking.config.storage import atomic_file
from mai_thinking.errors import one_line
from mai_thinking.rl.rewards import TERMS
from mai_thinking.rl.rollout import Group, Rollout
from mai_thinking.training.metrics import not_reproduced

FOLDER = "traces"  # Below a run's folder
_PART = re.compile(r"(?:batch|wave)-(\d{8,})-rank-(\d{5,})\.parquet")

Trace = dict[str, Any]  # One rollout: a row of the store, by column
Where = Sequence[tuple[str, str, Any]]
"""Conditions that rows must all meet, as `pyarrow.parquet` takes them: ("step", "in", {1, 2})."""


def _part_of_reward(name: str) -> Callable[[Rollout, Group], Any]:
    return lambda rollout, group: rollout.rewards.get(name)


# Of each column its kind and what it holds of a rollout and its group.
_COLUMNS: dict[str, tuple[pa.DataType, Callable[[Rollout, Group], Any]]] = {
    "engine_version": (pa.int64(), lambda r, g: g.version),  # weight updates that the engine had had by then
    "request_id": (pa.int64(), lambda r, g: r.id),  # unique in the run: with the run's seed, all its randomness
    "group_id": (pa.int64(), lambda r, g: g.number),  # rollouts of one drawing of one problem share it
    "task": (pa.string(), lambda r, g: r.problem.task),
    "problem_id": (pa.string(), lambda r, g: r.problem.id),
    "prompt": (pa.string(), lambda r, g: r.prompt),  # as the model saw it, template and all
    "prompt_ids": (pa.list_(pa.int32()), lambda r, g: r.prompt_ids),
    "response": (pa.string(), lambda r, g: r.text),
    # JSON: in turn what the policy wrote and what its calls gave; null where it made none.
    "parts": (pa.string(), lambda r, g: json.dumps(r.parts) if r.observed.any() else None),
    # With the end-of-text token, if it was drawn.
    "response_ids": (pa.list_(pa.int32()), lambda r, g: r.response_ids),
    # Response tokens that a tool wrote; empty where none did.
    "observed": (pa.list_(pa.bool_()), lambda r, g: r.observed if r.observed.any() else r.observed[:0]),
    # One a response token, under temperature and the nucleus.
    "logprobs": (pa.list_(pa.float32()), lambda r, g: r.logprobs),
    "finished": (pa.bool_(), lambda r, g: r.finished),  # ended by itself, rather than at the length limit
    "answer": (pa.string(), lambda r, g: r.answer),  # as parsed from the response; null if there was none
    "reference": (pa.string(), lambda r, g: r.problem.answer),  # the right answer
    "passed": (pa.bool_(), lambda r, g: r.grade.passed),  # the graders' verdict
    "reward": (pa.float64(), lambda r, g: r.reward),
    # Its parts, before their weights.
    **{f"reward_{name}": (pa.float64(), _part_of_reward(name)) for name in ("task", *TERMS)},
    "pass_rate": (pa.float64(), lambda r, g: g.pass_rate),  # ρ_q of the group
    "verdict": (pa.string(), lambda r, g: g.outcome),  # what became of the group: "kept" if it was learned from
}
SCHEMA = pa.schema(
    {"step": pa.int64()}  # gradient steps that the run had done when the rollout was generated
    | {name: kind for name, (kind, _) in _COLUMNS.items()}
    # The weights that generated it, such as `nano-grpo/step-00000120`, and where the run's first weights came from.
    | {"checkpoint": pa.string(), "lineage": pa.string()}
)


def trace_rows(group: Group, *, step: int, checkpoint: str, lineage: str) -> list[Trace]:
    """Of a group's rollouts, which `checkpoint` generated after `step` gradient steps."""
    run = {"step": step, "checkpoint": checkpoint, "lineage": lineage}
    return [run | {name: value(one, group) for name, (_, value) in _COLUMNS.items()} for one in group.rollouts]


class TraceStore:
    """Appends `rank`'s batches to `folder`, and reads those of all ranks."""

    def __init__(self, folder: Path | str, rank: int = 0) -> None:
        """Touches nothing on the disk; any number of readers may look on while a run writes."""
        self.folder, self.rank = Path(folder), rank

    def append(self, batch: int, traces: Sequence[Trace]) -> bool:
        """Write this rank's part of `batch`, on the disk when this returns; or, if it is there already, compare. →
        whether it was written. `not_reproduced` if what is there is something else; OSError, with nothing left
        behind, if it cannot be written."""
        table = pa.Table.from_pylist(list(traces), schema=SCHEMA)
        path = self.folder / f"batch-{batch:08d}-rank-{self.rank:05d}.parquet"
        if path.exists():
            try:
                before = _read_part(path)
            except (OSError, ValueError) as error:
                print(f"{path}: damaged ({one_line(error)}); written again", file=sys.stderr, flush=True)
            else:
                # As text, NaN is the same as NaN, and −0 another number than 0.
                stored = [name for name in pq.read_schema(path).names if name in SCHEMA.names]
                changed = [name for name in stored if repr(before[name].to_pylist()) != repr(table[name].to_pylist())]
                if not changed:
                    return False
                step = f"step {traces[0]['step']}, " if traces else ""
                not_reproduced(
                    f"{step}batch {batch} of rank {self.rank}, generated again after a restart, gave other values of "
                    f"{', '.join(changed[:3])} than {self.folder} has"
                )
                return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, durable=True) as temporary:
                pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        except OSError as error:  # named after the file, and not after the temporary one
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        return True

    def parts(self, where: Where = (), columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """The selected rows, batch by batch and rank by rank, so that a store larger than memory can be read. A column
        that a part was written without is null. A part that is damaged is named on stderr and left out."""
        for path in self._paths():
            try:
                table = _read_part(path, where, columns)
            except (OSError, ValueError) as error:
                print(f"{path}: damaged ({one_line(error)}); left out", file=sys.stderr, flush=True)
            else:
                if table.num_rows:
                    yield table

    def read(self, where: Where = (), columns: Sequence[str] = SCHEMA.names) -> pa.Table:
        """All of `parts` as one table; no rows where there is nothing."""
        nothing = SCHEMA.empty_table().select(columns)
        return pa.concat_tables([nothing, *self.parts(where, columns)])

    def _paths(self) -> list[Path]:
        """By batch, then rank."""
        if not self.folder.is_dir():
            return []
        matches = ((path, _PART.fullmatch(path.name)) for path in self.folder.iterdir())
        found = {path: (int(match[1]), int(match[2])) for path, match in matches if match}
        return sorted(found, key=found.__getitem__)


def _read_part(path: Path, where: Where = (), columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """The chosen rows of one file. OSError or ValueError if it is damaged."""
    if not {"step", "task", "passed"} <= set(pq.read_schema(path).names):
        raise ValueError("no trace file, or one of an earlier version")
    return pq.read_table(
        path,
        schema=SCHEMA,
        columns=list(columns),
        filters=list(where) or None,
        partitioning=None,
        page_checksum_verification=True,
    )
