"""The trace store: every rollout of a run, for self-distillation and for the curious.

    traces/wave-00000012-rank-00003.parquet     what rank 3 generated in the run's wave 12

One Parquet file a wave and rank, written under a temporary name, synchronised to the disk and renamed: under its final
name it is whole, whatever kills the process or fills the disk. A wave that is computed again after a restart must give
the same rollouts, bit for bit, and is not written a second time.
"""

import errno
import io
import json
import re
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from mai_thinking.config.storage import atomic_file
from mai_thinking.errors import RunError

FOLDER = "traces"
"""Below a run's folder."""
_PART = re.compile(r"wave-(\d{8,})-rank-(\d{5,})\.parquet")
_FINGERPRINTS = b"fingerprints"


@dataclass(frozen=True)
class Trace:
    """One rollout; a row of the store, whose columns have these names."""

    step: int
    """Gradient steps that the run had done when the rollout was generated."""
    engine_version: int
    """Weight updates that the engine had had by then."""
    request_id: int
    """Unique in the run; all randomness of the rollout follows from the run's seed and this."""
    group_id: int
    """Rollouts of one drawing of one problem share it."""
    task: str
    problem_id: str
    prompt: str
    """As the model saw it, template and all."""
    prompt_ids: Sequence[int] | np.ndarray
    response: str
    response_ids: Sequence[int] | np.ndarray
    """With the end-of-text token, if it was sampled."""
    logprobs: Sequence[float] | np.ndarray
    """One a response token, under temperature and the truncated distribution; stored as float32."""
    finished: bool
    """Ended by itself, rather than at the length limit."""
    answer: str | None
    """As parsed from the response; None if there was none."""
    reference: str
    """The right answer."""
    reward: float
    """R = R_task + w_lang·R_lang − w_len·R_len."""
    reward_task: float
    reward_language: float
    reward_length: float
    pass_rate: float
    """ρ_q of the group."""
    verdict: str
    """What became of the group: `rl.sampling.Verdict`, "kept" if it was learned from."""
    checkpoint: str
    """The weights that generated it, such as `nano-grpo/step-00000120`."""
    lineage: str
    """Where the run's first weights came from."""


SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("engine_version", pa.int64()),
        pa.field("request_id", pa.int64()),
        pa.field("group_id", pa.int64()),
        pa.field("task", pa.string()),
        pa.field("problem_id", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("response", pa.string()),
        pa.field("response_ids", pa.list_(pa.int32())),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("finished", pa.bool_()),
        pa.field("answer", pa.string()),
        pa.field("reference", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("reward_task", pa.float64()),
        pa.field("reward_language", pa.float64()),
        pa.field("reward_length", pa.float64()),
        pa.field("pass_rate", pa.float64()),
        pa.field("verdict", pa.string()),
        pa.field("checkpoint", pa.string()),
        pa.field("lineage", pa.string()),
    ]
)


class NotReproducedError(RunError):
    """A wave generated again gave other rollouts than the first time: the run is not deterministic."""


class TraceStore:
    """Appends `rank`'s waves to `folder`, and reads those of all ranks."""

    def __init__(self, folder: Path | str, rank: int = 0) -> None:
        """Touches nothing on the disk; any number of readers may look on while a run writes."""
        self.folder, self.rank = Path(folder), rank

    def append(self, wave: int, traces: Sequence[Trace]) -> bool:
        """Write this rank's part of `wave`, on the disk when this returns; or, if it is there already, compare.

        Returns whether it was written. NotReproducedError if what is there is something else; OSError, with nothing
        left behind, if it cannot be written.
        """
        columns = _columns(traces)
        fingerprints = {name: _fingerprint(column) for name, column in columns.items()}
        path = self.folder / f"wave-{wave:08d}-rank-{self.rank:05d}.parquet"
        if path.exists():
            try:
                before = _fingerprints_of(path)
            except (OSError, ValueError) as error:
                print(f"{path}: damaged ({_one_line(error)}); written again", file=sys.stderr, flush=True)
            else:
                self._compare(wave, traces, before, fingerprints)
                return False
        table = pa.table(columns, schema=SCHEMA).replace_schema_metadata({_FINGERPRINTS: json.dumps(fingerprints)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        _write_whole(path, buffer.getbuffer())
        return True

    def parts(
        self,
        *,
        steps: Container[int] | None = None,
        tasks: Container[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Iterator[pa.Table]:
        """The selected rows, wave by wave and rank by rank, so that a store larger than memory can be read.

        `steps` (such as `range(100, 200)`) and `tasks` choose rows, `columns` fields of `Trace`; None is all. A part
        that is damaged is named on stderr and left out.
        """
        for path in self._paths():
            try:
                table = _read_part(path, steps, tasks, columns)
            except (OSError, ValueError) as error:
                print(f"{path}: damaged ({_one_line(error)}); left out", file=sys.stderr, flush=True)
            else:
                if table is not None:
                    yield table

    def read(
        self,
        *,
        steps: Container[int] | None = None,
        tasks: Container[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """All of `parts` as one table; no rows where there is nothing."""
        empty = SCHEMA.empty_table()
        nothing = empty if columns is None else empty.select(list(columns))
        return pa.concat_tables([nothing, *self.parts(steps=steps, tasks=tasks, columns=columns)])

    def _paths(self) -> list[Path]:
        """By wave, then rank."""
        if not self.folder.is_dir():
            return []
        matches = ((path, _PART.fullmatch(path.name)) for path in self.folder.iterdir())
        found = {path: (int(match[1]), int(match[2])) for path, match in matches if match}
        return sorted(found, key=found.__getitem__)

    def _compare(self, wave: int, traces: Sequence[Trace], before: dict[str, str], now: dict[str, str]) -> None:
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            step = f"step {traces[0].step}, " if traces else ""
            raise NotReproducedError(
                f"{step}wave {wave} of rank {self.rank}, generated again after a restart, gave other values of "
                f"{', '.join(changed[:3])} than {self.folder} has: the run is not deterministic, or its config, code, "
                "data, machine or number of ranks changed"
            )


def _columns(traces: Sequence[Trace]) -> dict[str, pa.Array]:
    columns = {}
    for field in SCHEMA:
        values = [getattr(trace, field.name) for trace in traces]
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


def _fingerprint(column: pa.Array) -> str:
    """xxh3-128 of a column's values, bit for bit, whatever Arrow's layout of them."""
    digest = xxhash.xxh3_128(column.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_list(column.type):
        digest.update(column.value_lengths().to_numpy().tobytes())
        digest.update(column.flatten().to_numpy().tobytes())
    elif pa.types.is_string(column.type):
        texts = [(text or "").encode() for text in column.to_pylist()]
        digest.update(np.array([len(text) for text in texts], dtype=np.int64).tobytes())
        digest.update(b"".join(texts))
    else:
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _write_whole(path: Path, content: memoryview) -> None:
    """`path` has `content` and is on the disk when this returns; after an OSError there is nothing of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, durable=True) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def _fingerprints_of(path: Path) -> dict[str, str]:
    """As stored; the data is read too, so that damage anywhere raises."""
    table = pq.read_table(path, page_checksum_verification=True)
    return _metadata(table)


def _metadata(table: pa.Table) -> dict[str, str]:
    stored = (table.schema.metadata or {}).get(_FINGERPRINTS)
    if stored is None:
        raise ValueError("not a trace file")
    fingerprints: dict[str, str] = json.loads(stored)
    return fingerprints


def _read_part(
    path: Path, steps: Container[int] | None, tasks: Container[str] | None, columns: Sequence[str] | None
) -> pa.Table | None:
    """The chosen rows of one file; None if there are none. OSError or ValueError if it is damaged."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        keys = file.read(columns=["step", "task"])
        _metadata(keys)
        chosen = np.ones(keys.num_rows, dtype=bool)
        for name, wanted in (("step", steps), ("task", tasks)):
            if wanted is not None:
                values = [value for value in keys[name].unique().to_pylist() if value in wanted]
                chosen &= pc.is_in(keys[name], pa.array(values, SCHEMA.field(name).type)).to_numpy()
        if not chosen.any():
            return None
        table = file.read(columns=list(columns or SCHEMA.names))
    return table.filter(pa.array(chosen)).replace_schema_metadata(None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
