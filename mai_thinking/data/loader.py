"""Batches for one rank: deterministic, prefetched, and restorable at any step and any number of ranks."""

import functools
import json
import queue
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from mai_thinking.data.accounting import LeftOut
from mai_thinking.data.mixture import Mixture
from mai_thinking.data.packing import PreparedRows, Row, positions
from mai_thinking.data.prepared import PreparedData
from mai_thinking.data.readers import open_reader
from mai_thinking.data.streaming import StreamCleaner, StreamedRows
from mai_thinking.errors import DataError, UsageError


class Batch(NamedTuple):
    """This rank's share of a global batch."""

    micro_batches: list[dict[str, Tensor]]
    """Each with `input_ids`, `labels` and `position_ids`, int64 [micro_batch_size, T]; no label is ever missing."""
    document_ids: list[list[str]]
    """For each row, in order, `SOURCE/ID` of the documents in it."""


class Loader:
    """An endless iterator over `Batch`s.

    Row n of the run depends on the seed, the mixture and n alone; a global batch is the next `rows_per_step` rows, of
    which rank r takes the r-th contiguous part. It neither reads nor advances any global random generator. A background
    thread makes up to `prefetch` steps ahead; what it raises is raised by the step that would have had the data.
    `state_dict` is that of the last step delivered, whatever was made ahead. Use as a context manager, or `close`.

    A streamed source is read whole by every rank, each keeping its own rows.
    """

    def __init__(
        self,
        prepared: PreparedData,
        *,
        context_length: int,
        micro_batch_size: int,
        rows_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        prefetch: int = 4,
    ) -> None:
        """`rows_per_step` is the global batch, over all ranks and accumulation steps; 0 `prefetch` means no thread."""
        if rows_per_step % (world_size * micro_batch_size):
            raise UsageError(
                f"batch.global_batch_size: {rows_per_step} rows cannot be divided over {world_size} ranks × "
                f"micro-batches of {micro_batch_size}; make it a multiple of {world_size * micro_batch_size}"
            )
        # A thread that was stopped keeps its row maker: in mid-read it may not be interrupted, so it is not reused.
        self._new_rows = functools.partial(_RowMaker, prepared, context_length=context_length, seed=seed)
        self._rows = self._new_rows()
        self._shape = rows_per_step, micro_batch_size, rank, world_size
        self._prefetch = prefetch
        self._worker: _Worker | None = None
        self._state = self._rows.state()
        self.wait_seconds = 0.0
        """Seconds that the last step waited for its data."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        try:
            if self._prefetch == 0:
                step, self._state = _make_step(self._rows, *self._shape)
            else:
                if self._worker is None:
                    self._worker = _Worker(self._rows, self._shape, self._prefetch)
                step, self._state = self._worker.get()
        except UsageError as error:
            raise DataError(str(error)) from None
        self.wait_seconds = time.perf_counter() - begin
        return step

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON that describes the position behind the last step delivered; the same on every rank."""
        state: dict[str, Any] = json.loads(json.dumps(self._state))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the step that `state` describes. UsageError if it comes from other data, seed or row length."""
        rows = self._new_rows()
        rows.restore(state)
        self.close()
        self._rows, self._state = rows, rows.state()

    def left_out(self) -> list[LeftOut]:
        """What the streams have dropped so far, repeated passes included."""
        return [
            LeftOut(name, f"{rule} dropped {dropped:,} of {stream['read']:,} documents streamed so far")
            for name, stream in self._state["streams"].items()
            for rule, dropped in stream["dropped"].items()
        ]

    def close(self) -> None:
        """Stop the thread. Iterating again goes on behind the last step delivered."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
            self._rows = self._new_rows()
            self._rows.restore(self._state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _RowMaker:
    """The run's sequence of rows, and the position in it."""

    def __init__(self, prepared: PreparedData, *, context_length: int, seed: int) -> None:
        self.end_of_text = prepared.encoder.end_of_text
        self._weights = {source.name: source.weight for source in prepared.config.sources}
        self._identity = {
            "data": prepared.content,
            "weights": self._weights,
            "seed": seed,
            "context_length": context_length,
        }
        self._mixture = Mixture(self._weights)
        self._prepared: dict[str, PreparedRows] = {}
        self._streamed: dict[str, StreamedRows] = {}
        for source in prepared.config.sources:
            name = source.name
            if source.streaming:
                start, cleaner = prepared.stream_start(name), StreamCleaner(prepared.config.cleaning, prepared.overlap)
                self._streamed[name] = StreamedRows(
                    name, open_reader(source), start, cleaner, prepared.encoder, context_length=context_length
                )
                continue
            data = prepared.sources[name]
            if len(data.tokens) <= context_length:
                raise UsageError(
                    f"source {name!r} has {len(data.tokens)} tokens, too few for a row of context_length "
                    f"{context_length}; shorten context_length, add data, or remove the source"
                )
            self._prepared[name] = PreparedRows(
                name, data.tokens, data.offsets, data.ids, context_length=context_length, seed=seed
            )

    @property
    def position(self) -> int:
        """Rows dealt so far."""
        return sum(self._mixture.rows.values())

    def next_row(self, wanted: bool) -> Row | None:
        """The run's next row, or None where it is not wanted and need not be made."""
        name, index = self._mixture.next_source()
        if name in self._streamed:
            return self._streamed[name].next_row()
        return self._prepared[name].row(index) if wanted else None

    def state(self) -> dict[str, Any]:
        streams = {name: rows.state() for name, rows in self._streamed.items()}
        return {**self._identity, "rows": dict(self._mixture.rows), "streams": streams}

    def restore(self, state: Mapping[str, Any]) -> None:
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise UsageError(
                    f"the checkpoint's data position has {key} {state.get(key)!r}, this run {value!r}; "
                    "restore what the checkpoint had, or start a new run from its weights"
                )
        self._mixture = Mixture(self._weights)
        self._mixture.rows.update(state["rows"])
        for name, rows in self._streamed.items():
            rows.restore(state["streams"][name])


def _make_step(
    rows: _RowMaker, rows_per_step: int, micro_batch_size: int, rank: int, world_size: int
) -> tuple[Batch, dict[str, Any]]:
    """The next step of `rank`, and the state behind it."""
    share = rows_per_step // world_size
    first = rows.position
    mine = range(first + rank * share, first + (rank + 1) * share)
    made = [rows.next_row(wanted=n in mine) for n in range(first, first + rows_per_step)]
    kept = [row for n, row in enumerate(made, first) if row is not None and n in mine]
    micro_batches = [
        _collate(kept[start : start + micro_batch_size], rows.end_of_text)
        for start in range(0, share, micro_batch_size)
    ]
    return Batch(micro_batches, [row.document_ids for row in kept]), rows.state()


def _collate(rows: list[Row], end_of_text: int) -> dict[str, Tensor]:
    tokens_BT1 = np.stack([row.tokens for row in rows])
    input_ids_BT = np.ascontiguousarray(tokens_BT1[:, :-1])
    position_ids_BT = np.stack([positions(input_ids_T, end_of_text) for input_ids_T in input_ids_BT])
    return {
        "input_ids": torch.from_numpy(input_ids_BT),
        "labels": torch.from_numpy(np.ascontiguousarray(tokens_BT1[:, 1:])),
        "position_ids": torch.from_numpy(position_ids_BT),
    }


_Item = tuple[Batch, dict[str, Any]] | BaseException


class _Worker:
    """A thread that makes steps into a bounded queue. It knows no loader, so a loader that is dropped is collected."""

    def __init__(self, rows: _RowMaker, shape: tuple[int, int, int, int], depth: int) -> None:
        self._queue: queue.Queue[_Item] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        arguments = rows, shape, self._queue, self._stopped
        self._thread = threading.Thread(target=_fill, args=arguments, name="data-prefetch", daemon=True)
        # Also at interpreter exit: a daemon thread that still computes then can crash the process.
        self.stop = weakref.finalize(self, _stop, self._stopped, self._thread)
        self._thread.start()

    def get(self) -> tuple[Batch, dict[str, Any]]:
        """The next step; raises what the thread raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # a second attempt gets the same answer, not a wait without end
            raise item
        return item


def _fill(
    rows: _RowMaker, shape: tuple[int, int, int, int], items: "queue.Queue[_Item]", stopped: threading.Event
) -> None:
    while not stopped.is_set():
        item: _Item
        try:
            item = _make_step(rows, *shape)
        except BaseException as error:
            item = error
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return


def _stop(stopped: threading.Event, thread: threading.Thread) -> None:
    stopped.set()
    # Longer than making a step takes; a read from a network that hangs must not hold up the exit.
    thread.join(timeout=10)
