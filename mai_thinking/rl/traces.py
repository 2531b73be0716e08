"""The trace store: every rollout of a run, for self-distillation and for the curious.

    traces/batch-00000012-rank-00003.parquet     what rank 3 generated for the run's batch 12 of problems

One Parquet file a batch and rank, written under a temporary name, synchronised to the disk and renamed: under its final
name it is whole, whatever kills the process or fills the disk. A batch that is computed again after a restart must give
the same rollouts, bit for bit, and is not written a second time.
"""

import errno
import functools
import json
import operator
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from mai_thinking.config.storage import atomic_file
from mai_thinking.errors import RunError
from mai_thinking.rl.rewards import TERMS
from mai_thinking.rl.rollout import Group

FOLDER = "traces"
"""Below a run's folder."""
_PART = re.compile(r"(?:batch|wave)-(\d{8,})-rank-(\d{5,})\.parquet")

_NONE = np.empty(0, dtype=bool)
_WITH_TOOLS = {"observed": _NONE, "parts": None}
"""Columns that a trace without tools may lack, and what they then hold."""

Trace = dict[str, Any]
"""One rollout: a row of the store, by column."""
SCHEMA = pa.schema(
    {
        "step": pa.int64(),  # gradient steps that the run had done when the rollout was generated
        "engine_version": pa.int64(),  # weight updates that the engine had had by then
        "request_id": pa.int64(),  # unique in the run; all its randomness follows from the run's seed and this
        "group_id": pa.int64(),  # rollouts of one drawing of one problem share it
        "task": pa.string(),
        "problem_id": pa.string(),
        "prompt": pa.string(),  # as the model saw it, template and all
        "prompt_ids": pa.list_(pa.int32()),
        "response": pa.string(),
        "parts": pa.string(),  # JSON: in turn what the policy wrote and what its calls gave; null where it made none
        "response_ids": pa.list_(pa.int32()),  # with the end-of-text token, if it was drawn
        "observed": pa.list_(pa.bool_()),  # response tokens that a tool wrote; empty where none did
        "logprobs": pa.list_(pa.float32()),  # one a response token, under temperature and the nucleus
        "finished": pa.bool_(),  # ended by itself, rather than at the length limit
        "answer": pa.string(),  # as parsed from the response; null if there was none
        "reference": pa.string(),  # the right answer
        "passed": pa.bool_(),  # the graders' verdict
        "reward": pa.float64(),
        **{f"reward_{name}": pa.float64() for name in ("task", *TERMS)},  # its parts, before their weights
        "pass_rate": pa.float64(),  # ρ_q of the group
        "verdict": pa.string(),  # what became of the group: `rl.rollout.Verdict`, "kept" if it was learned from
        "checkpoint": pa.string(),  # the weights that generated it, such as `nano-grpo/step-00000120`
        "lineage": pa.string(),  # where the run's first weights came from
    }.items()
)


def trace_rows(group: Group, *, step: int, checkpoint: str, lineage: str) -> list[Trace]:
    """Of a group's rollouts, which `checkpoint` generated after `step` gradient steps."""
    return [
        {
            "step": step,
            "engine_version": group.version,
            "request_id": rollout.id,
            "group_id": group.number,
            "task": rollout.problem.task,
            "problem_id": rollout.problem.id,
            "prompt": rollout.prompt,
            "prompt_ids": rollout.prompt_ids,
            "response": rollout.text,
            "parts": json.dumps(rollout.parts) if rollout.observed.any() else None,
            "response_ids": rollout.response_ids,
            "observed": rollout.observed if rollout.observed.any() else _NONE,
            "logprobs": rollout.logprobs,
            "finished": rollout.finished,
            "answer": rollout.answer,
            "reference": rollout.problem.answer,
            "passed": rollout.grade.passed,
            "reward": rollout.reward,
            **{f"reward_{name}": value for name, value in rollout.rewards.items()},
            "pass_rate": group.pass_rate,
            "verdict": str(group.verdict),
            "checkpoint": checkpoint,
            "lineage": lineage,
        }
        for rollout in group.rollouts
    ]


class NotReproducedError(RunError):
    """A batch generated again gave other rollouts than the first time: the run is not deterministic."""


class TraceStore:
    """Appends `rank`'s batches to `folder`, and reads those of all ranks."""

    def __init__(self, folder: Path | str, rank: int = 0) -> None:
        """Touches nothing on the disk; any number of readers may look on while a run writes."""
        self.folder, self.rank = Path(folder), rank

    def append(self, batch: int, traces: Sequence[Trace]) -> bool:
        """Write this rank's part of `batch`, on the disk when this returns; or, if it is there already, compare.

        Returns whether it was written. NotReproducedError if what is there is something else; OSError, with nothing
        left behind, if it cannot be written.
        """
        table = pa.table(_columns(traces), schema=SCHEMA)
        name = f"-{batch:08d}-rank-{self.rank:05d}.parquet"
        path = old if (old := self.folder / f"wave{name}").exists() else self.folder / f"batch{name}"
        if path.exists():
            try:
                before = _read_part(path)
            except (OSError, ValueError) as error:
                print(f"{path}: damaged ({_one_line(error)}); written again", file=sys.stderr, flush=True)
            else:
                stored = [name for name in pq.read_schema(path).names if name in SCHEMA.names]
                self._compare(batch, before.select(stored), table)
                return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, durable=True) as temporary:
                pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        except OSError as error:  # named after the file, and not after the temporary one
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        return True

    def parts(
        self,
        *,
        steps: Collection[int] | None = None,
        tasks: Collection[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Iterator[pa.Table]:
        """The selected rows, batch by batch and rank by rank, so that a store larger than memory can be read.

        `steps` and `tasks` choose rows, `columns` some of `SCHEMA`'s; None is all. A column that a part was written
        without is null. A part that is damaged is named on stderr and left out.
        """
        for path in self._paths():
            try:
                table = _read_part(path, steps, tasks, columns)
            except (OSError, ValueError) as error:
                print(f"{path}: damaged ({_one_line(error)}); left out", file=sys.stderr, flush=True)
            else:
                if table.num_rows:
                    yield table

    def read(
        self,
        *,
        steps: Collection[int] | None = None,
        tasks: Collection[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """All of `parts` as one table; no rows where there is nothing."""
        empty = SCHEMA.empty_table()
        nothing = empty if columns is None else empty.select(list(columns))
        return pa.concat_tables([nothing, *self.parts(steps=steps, tasks=tasks, columns=columns)])

    def _paths(self) -> list[Path]:
        """By batch, then rank."""
        if not self.folder.is_dir():
            return []
        matches = ((path, _PART.fullmatch(path.name)) for path in self.folder.iterdir())
        found = {path: (int(match[1]), int(match[2])) for path, match in matches if match}
        return sorted(found, key=found.__getitem__)

    def _compare(self, batch: int, before: pa.Table, now: pa.Table) -> None:
        changed = [name for name in before.column_names if _fingerprint(before[name]) != _fingerprint(now[name])]
        if changed:
            step = f"step {now['step'][0]}, " if len(now) else ""
            raise NotReproducedError(
                f"{step}batch {batch} of rank {self.rank}, generated again after a restart, gave other values of "
                f"{', '.join(changed[:3])} than {self.folder} has: the run is not deterministic, or its config, code, "
                "data, machine or number of ranks changed"
            )


def _columns(traces: Sequence[Trace]) -> dict[str, pa.Array]:
    columns = {}
    for field in SCHEMA:
        values = [(_WITH_TOOLS | trace)[field.name] for trace in traces]
        columns[field.name] = (
            _list_column(values, field.type) if pa.types.is_list(field.type) else pa.array(values, field.type)
        )
    return columns


def _list_column(values: Sequence[Any], kind: pa.ListType) -> pa.Array:
    """Lists or arrays, one a row, without a Python object per element."""
    dtype = kind.value_type.to_pandas_dtype()
    arrays = [np.asarray(value, dtype=dtype).reshape(-1) for value in values]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    flat = np.concatenate([np.empty(0, dtype), *arrays])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind.value_type))


def _fingerprint(chunks: pa.ChunkedArray) -> str:
    """xxh3-128 of a column's values, bit for bit, whatever Arrow's layout of them."""
    column = pa.concat_arrays([pa.array([], chunks.type), *chunks.chunks])
    digest = xxhash.xxh3_128(column.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_list(column.type):
        digest.update(column.value_lengths().to_numpy().tobytes())
        digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
    elif pa.types.is_string(column.type):
        texts = [(text or "").encode() for text in column.to_pylist()]
        digest.update(np.array([len(text) for text in texts], dtype=np.int64).tobytes())
        digest.update(b"".join(texts))
    else:
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _read_part(
    path: Path,
    steps: Collection[int] | None = None,
    tasks: Collection[str] | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The chosen rows of one file. OSError or ValueError if it is damaged."""
    names = set(pq.read_schema(path).names)
    if not {"step", "task"} <= names:
        raise ValueError("not a trace file")
    conditions = [
        pc.field(name).isin(list(values)) for name, values in (("step", steps), ("task", tasks)) if values is not None
    ]
    columns = list(columns or SCHEMA.names)
    table = pq.read_table(
        path,
        schema=SCHEMA,
        columns=[*columns, *({"reward_task"} - set(columns))],
        filters=functools.reduce(operator.and_, conditions) if conditions else None,
        partitioning=None,
        page_checksum_verification=True,
    )
    if "passed" in columns and "passed" not in names:  # a store of before: what had earned something passed, then
        place = table.column_names.index("passed")
        table = table.set_column(place, SCHEMA.field("passed"), pc.greater(table["reward_task"], 0.0))
    return table.select(columns)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
