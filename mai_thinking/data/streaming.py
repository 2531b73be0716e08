"""Rows of a source that is read while training, for data larger than memory or disk.

Applied on the fly, document by document: quality filters, decontamination against the held-out text, and exact
deduplication within the last `MEMORY` documents. Not applied: MinHash, shuffling, deduplication against other sources.
The held-out documents are the head of the stream; training starts behind them. At its end the stream begins again.
"""

import base64
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mai_thinking.config.data import CleaningSection
from mai_thinking.data.cleaning import quality_fault
from mai_thinking.data.documents import Document
from mai_thinking.data.files import Cursor, Reader
from mai_thinking.data.ngrams import OverlapIndex
from mai_thinking.data.packing import Row, Tokens
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import UsageError

MEMORY = 8192
"""How many documents exact deduplication of a stream remembers."""


class StreamCleaner:
    """The per-document rules of a stream. Its memory and its counts are part of the stream's state."""

    def __init__(self, cleaning: CleaningSection, overlap: OverlapIndex | None) -> None:
        self._cleaning = cleaning
        self._overlap = overlap
        self._order: deque[int] = deque()
        self._seen: set[int] = set()
        self.dropped: dict[str, int] = {}

    def clean(self, text: str) -> str | None:
        """The text to train on, or None; counts what it drops."""
        if self._cleaning.exact_duplicates and not self._remember(Document("", text).fingerprint):
            return self._drop("exact_duplicates")
        fault = quality_fault(text, self._cleaning.quality)
        if fault:
            return self._drop(fault)
        kept = self._overlap.clean(text) if self._overlap else text
        return kept if kept else self._drop("decontamination")

    def forget(self) -> None:
        """Start anew, as at the stream's end: the next pass is not a duplicate of this one."""
        self._order.clear()
        self._seen.clear()

    def state(self) -> dict[str, Any]:
        """Memory (base64 of 64-bit hashes, oldest first) and counts."""
        memory = base64.b64encode(np.array(self._order, dtype="<u8").tobytes()).decode()
        return {"memory": memory, "dropped": dict(self.dropped)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._order = deque(np.frombuffer(base64.b64decode(state["memory"]), dtype="<u8").tolist())
        self._seen = set(self._order)
        self.dropped = dict(state["dropped"])

    def _remember(self, fingerprint: int) -> bool:
        if fingerprint in self._seen:
            return False
        self._seen.add(fingerprint)
        self._order.append(fingerprint)
        if len(self._order) > MEMORY:
            self._seen.discard(self._order.popleft())
        return True

    def _drop(self, rule: str) -> None:
        self.dropped[rule] = self.dropped.get(rule, 0) + 1


class _Segment(NamedTuple):
    """A document in the buffer, and the state in which it would be read again."""

    id: str
    tokens: Tokens
    before: dict[str, Any]


class StreamedRows:
    """The rows of a stream, in order only. Its state is that of the document in which the next row begins."""

    def __init__(
        self,
        name: str,
        reader: Reader,
        start: Cursor | None,
        cleaner: StreamCleaner,
        encoder: Encoder,
        *,
        context_length: int,
    ) -> None:
        """`start`: where training begins, behind the held-out documents."""
        self.name = name
        self.context_length = context_length
        self._reader, self._start, self._cleaner, self._encoder = reader, start, cleaner, encoder
        self._restart({"pass": 0, "cursor": start, **cleaner.state()}, offset=0)

    def next_row(self) -> Row:
        """The next T + 1 tokens; the last of them is the first of the row after."""
        T = self.context_length
        while self._available <= T:
            segment = next(self._documents)
            self._segments.append(segment)
            self._available += len(segment.tokens)
        first = self._segments[0].tokens[self._offset :]
        tokens_T1 = np.concatenate([first, *(segment.tokens for segment in list(self._segments)[1:])])[: T + 1]
        ids = self._advance(T)
        return Row(tokens_T1, ids)

    def state(self) -> dict[str, Any]:
        """Plain JSON; `restore` with it makes `next_row` give what it would give now."""
        before = self._segments[0].before if self._segments else self._initial
        return {**before, "offset": self._offset}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._restart({key: value for key, value in state.items() if key != "offset"}, state["offset"])

    def _restart(self, initial: dict[str, Any], offset: int) -> None:
        self._initial, self._offset = initial, offset
        self._cleaner.restore(initial)
        self._segments: deque[_Segment] = deque()
        self._available = -offset
        self._documents = self._read(initial["cursor"], initial["pass"])

    def _advance(self, tokens: int) -> list[str]:
        """Drop `tokens` from the buffer's head; the ids of the documents that they came from."""
        self._available -= tokens
        self._offset += tokens
        ids = [f"{self.name}/{self._segments[0].id}"]
        while self._offset >= len(self._segments[0].tokens):
            self._offset -= len(self._segments.popleft().tokens)
            if self._offset:
                ids.append(f"{self.name}/{self._segments[0].id}")
        return ids

    def _read(self, cursor: Cursor | None, epoch: int) -> Iterator[_Segment]:
        """Cleaned documents without end."""
        while True:
            found = False
            before = {"pass": epoch, "cursor": cursor, **self._cleaner.state()}
            for document, cursor in self._reader.read(cursor):
                text = self._cleaner.clean(document.text)
                if text is not None:
                    found = True
                    yield _Segment(document.id, self._encoder.encode_document(text), before)
                before = {"pass": epoch, "cursor": cursor, **self._cleaner.state()}
            if not found and before["cursor"] is not None and epoch > 0:
                raise UsageError(f"source {self.name!r}: a whole pass over the stream left no document to train on")
            cursor, epoch = self._start, epoch + 1
            self._cleaner.forget()
