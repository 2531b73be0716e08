"""Batches for one rank: deterministic, prefetched, and restorable at any step and any number of ranks."""

import copy
import functools
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mai_thinking.data.accounting import LeftOut
from mai_thinking.data.packing import Mixture, PreparedRows, Row, positions
from mai_thinking.data.prepared import PreparedData
from mai_thinking.data.streaming import StreamedRows
from mai_thinking.errors import DataError, UsageError


class Batch(NamedTuple):
    """This rank's share of a global batch."""

    micro_batches: list[dict[str, Tensor]]
    """Each with `input_ids`, `labels` and `position_ids`, int64 [micro_batch_size, T]; no label is ever missing."""
    document_ids: list[list[str]]
    """For each row, in order, `SOURCE/ID` of the documents in it."""


class Loader(Iterator[Batch], AbstractContextManager["Loader"]):
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
        share = rows_per_step // world_size
        mine = range(rank * share, (rank + 1) * share)
        self._rows = _RowMaker(prepared, context_length, seed)
        # The thread knows the rows alone, so that a loader that nobody closes can go.
        self._make = functools.partial(self._rows.step, rows_per_step, mine, micro_batch_size)
        self._prefetch = prefetch
        self._ahead: deque[Future[tuple[Batch, dict[str, Any]]]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        self._state = self._rows.state()
        self.wait_seconds = 0.0
        """Seconds that the last step waited for its data."""

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        try:
            step, self._state = self._made_ahead() if self._prefetch else self._make()
        except UsageError as error:
            raise DataError(str(error)) from None
        self.wait_seconds = time.perf_counter() - begin
        return step

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON that describes the position behind the last step delivered; the same on every rank."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the step that `state` describes. UsageError if it comes from other data, seed or row length."""
        self.close()
        self._rows.restore(state)
        self._state = self._rows.state()

    def left_out(self) -> list[LeftOut]:
        """What the streams have dropped so far, repeated passes included."""
        return [
            LeftOut(name, f"{rule} dropped {dropped:,} of {stream['read']:,} documents streamed so far")
            for name, stream in self._state["streams"].items()
            for rule, dropped in stream["dropped"].items()
        ]

    def close(self) -> None:
        """Stop the thread. Iterating again goes on behind the last step delivered."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
            self._ahead.clear()
            self._rows.restore(self._state)

    def _made_ahead(self) -> tuple[Batch, dict[str, Any]]:
        """The next step from the thread, which makes one more for it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "data-prefetch")
            weakref.finalize(self, self._thread.shutdown, cancel_futures=True)  # also of a loader that is dropped
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._thread.submit(self._make))
        made = self._ahead[0].result()  # a second attempt after an error gets the same error
        self._ahead.popleft()
        return made

    def __exit__(self, *_: object) -> None:
        self.close()


class _RowMaker:
    """The run's sequence of rows, and the position in it."""

    def __init__(self, prepared: PreparedData, context_length: int, seed: int) -> None:
        self._end_of_text = prepared.encoder.end_of_text
        weights = {source.name: source.weight for source in prepared.config.sources}
        self._identity = {"data": prepared.content, "weights": weights, "seed": seed, "context_length": context_length}
        self._mixture = Mixture(weights)
        self._prepared: dict[str, PreparedRows] = {}
        self._streamed: dict[str, StreamedRows] = {}
        for source in prepared.config.sources:
            name = source.name
            if source.streaming:
                self._streamed[name] = StreamedRows(source, prepared, context_length=context_length)
            else:
                data = prepared.sources[name]
                self._prepared[name] = PreparedRows(name, data, context_length=context_length, seed=seed)

    def step(self, rows: int, mine: range, micro_batch_size: int) -> tuple[Batch, dict[str, Any]]:
        """The next step of this rank, which has `mine` of its `rows`, and the state behind it."""
        kept = []
        for place in range(rows):
            name, index = self._mixture.next_source()
            if name in self._streamed:  # in order only: the others' rows are read too
                row = self._streamed[name].next_row()
                kept += [row] if place in mine else []
            elif place in mine:
                kept.append(self._prepared[name].row(index))
        pieces = [kept[at : at + micro_batch_size] for at in range(0, len(kept), micro_batch_size)]
        micro_batches = [_collate(piece, self._end_of_text) for piece in pieces]
        return Batch(micro_batches, [row.document_ids for row in kept]), self.state()

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
        self._mixture.rows.update(state["rows"])
        for name, rows in self._streamed.items():
            rows.restore(state["streams"][name])


def _collate(rows: list[Row], end_of_text: int) -> dict[str, Tensor]:
    tokens_BT1 = np.stack([row.tokens for row in rows])
    arrays = {
        "input_ids": tokens_BT1[:, :-1],
        "labels": tokens_BT1[:, 1:],
        "position_ids": np.stack([positions(tokens_T1[:-1], end_of_text) for tokens_T1 in tokens_BT1]),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
