"""Rows of a source that is read while training, for data larger than memory or disk.

Applied on the fly, document by document: quality filters, decontamination against the held-out text, and exact
deduplication within the last `MEMORY` documents. Not applied: what compares a document with all others, boilerplate,
labels, shuffling.
The held-out documents are the head of the stream; training starts behind them. At its end the stream begins again.
"""

import base64
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mai_thinking.config.data import CleaningSection, SourceSection
from mai_thinking.data.cleaning import quality_fault
from mai_thinking.data.decontamination import OverlapIndex
from mai_thinking.data.documents import Document
from mai_thinking.data.packing import Row, Tokens
from mai_thinking.data.prepared import PreparedData
from mai_thinking.data.readers import Cursor, open_reader
from mai_thinking.errors import UsageError

MEMORY = 8192
"""How many documents exact deduplication of a stream remembers."""


class Mark(NamedTuple):
    """A moment in the life of a `StreamCleaner`: documents remembered since its first, how many it had read, and how
    many it had dropped by which rule."""

    remembered: int
    read: int
    dropped: dict[str, int]


class StreamCleaner:
    """The per-document rules of a stream. Its memory and its counts are part of the stream's state."""

    def __init__(self, cleaning: CleaningSection, overlap: OverlapIndex | None) -> None:
        self._cleaning, self._overlap = cleaning, overlap
        self._log: deque[int] = deque()
        """Hashes of documents, `_forgotten` before the first of them."""
        self._recent: set[int] = set()
        self._forgotten = self._read = 0
        self._dropped: dict[str, int] = {}

    def clean(self, text: str | None, epoch: int = 0) -> str | None:
        """The text to train on, or None; counts what it drops. A text is a duplicate only within its epoch."""
        self._read += 1
        kept = text
        if text is None:
            rule: str | None = "null"
        elif self._is_duplicate(text, epoch):
            rule = "exact_duplicates"
        else:
            rule = quality_fault(text, self._cleaning.quality)
            if rule is None and self._overlap is not None:
                kept = self._overlap.clean(text)
                rule = None if kept is not None else "decontamination"
        if rule is None:
            return kept
        self._dropped = {**self._dropped, rule: self._dropped.get(rule, 0) + 1}  # marks keep the one of before
        return None

    def mark(self) -> Mark:
        """Now, to be given to `state` later."""
        return Mark(self._forgotten + len(self._log), self._read, self._dropped)

    def state(self, mark: Mark) -> dict[str, Any]:
        """What there was at `mark`: the memory, as base64 of 64-bit hashes, oldest first, and the counts."""
        end = mark.remembered - self._forgotten
        memory = np.array(list(self._log)[max(end - MEMORY, 0) : end], dtype="<u8")
        return {"memory": base64.b64encode(memory.tobytes()).decode(), "read": mark.read, "dropped": mark.dropped}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._log = deque(np.frombuffer(base64.b64decode(state["memory"]), dtype="<u8").tolist())
        self._recent, self._forgotten = set(self._log), 0
        self._read, self._dropped = state["read"], dict(state["dropped"])

    def forget_before(self, mark: Mark) -> None:
        """No `state` of an earlier moment than `mark` will be asked for."""
        while self._forgotten + MEMORY < mark.remembered:
            self._log.popleft()
            self._forgotten += 1

    def _is_duplicate(self, text: str, epoch: int) -> bool:
        if not self._cleaning.exact_duplicates:
            return False
        fingerprint = (Document("", text).fingerprint + epoch) % 2**64
        if fingerprint in self._recent:
            return True
        self._recent.add(fingerprint)
        self._log.append(fingerprint)
        if len(self._recent) > MEMORY:
            self._recent.discard(self._log[-1 - MEMORY])
        return False


class _Place(NamedTuple):
    """From where a document would be read again."""

    epoch: int
    cursor: Cursor | None
    mark: Mark


class _Segment(NamedTuple):
    """A document in the buffer."""

    id: str
    tokens: Tokens
    place: _Place


class StreamedRows:
    """The rows of a stream, in order only. Its state is the place of the document in which the next row begins."""

    def __init__(self, source: SourceSection, prepared: PreparedData, *, context_length: int) -> None:
        self.name, self.context_length = source.name, context_length
        self._reader, self._encoder = open_reader(source), prepared.encoder
        self._cleaner = StreamCleaner(prepared.config.cleaning, prepared.overlap)
        self._start: Cursor | None = prepared.manifest["sources"][source.name]["stream_start"]
        """Where training begins, behind the held-out documents."""
        self._begin(0, self._start, offset=0)

    def next_row(self) -> Row:
        """The next T + 1 tokens; the last of them is the first of the row after."""
        T = self.context_length
        while self._available <= T:
            segment = next(self._documents)
            self._segments.append(segment)
            self._available += len(segment.tokens)
        pieces, offset, missing = [], self._offset, T + 1
        for segment in self._segments:  # cut each before they are joined: a document may be as large as a file
            pieces.append(segment.tokens[offset : offset + missing])
            offset, missing = 0, missing - len(pieces[-1])
        return Row(np.concatenate(pieces), self._advance(T))

    def state(self) -> dict[str, Any]:
        """Plain JSON; `restore` with it makes `next_row` give what it would give now."""
        place = self._segments[0].place if self._segments else self._first
        at = {"epoch": place.epoch, "cursor": place.cursor, "offset": self._offset}
        return at | self._cleaner.state(place.mark)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._cleaner.restore(state)
        self._begin(state["epoch"], state["cursor"], state["offset"])

    def _begin(self, epoch: int, cursor: Cursor | None, offset: int) -> None:
        """Read on from `cursor`; the next row begins `offset` tokens into the document there."""
        self._first = _Place(epoch, cursor, self._cleaner.mark())
        self._offset = offset
        self._available = -offset
        self._segments: deque[_Segment] = deque()
        self._documents = self._read(epoch, cursor)

    def _advance(self, tokens: int) -> list[str]:
        """Drop `tokens` from the buffer's head; the ids of the documents that they came from."""
        self._available -= tokens
        self._offset += tokens
        ids = [f"{self.name}/{self._segments[0].id}"]
        while self._offset >= len(self._segments[0].tokens):
            self._offset -= len(self._segments.popleft().tokens)
            if self._offset:
                ids.append(f"{self.name}/{self._segments[0].id}")
        self._cleaner.forget_before(self._segments[0].place.mark)
        return ids

    def _read(self, epoch: int, cursor: Cursor | None) -> Iterator[_Segment]:
        """Cleaned documents without end."""
        while True:
            whole_pass, found = cursor == self._start, False
            for id, raw, behind in self._reader.read(cursor):
                place = _Place(epoch, cursor, self._cleaner.mark())
                text = self._cleaner.clean(raw, epoch)
                if text is not None:
                    found = True
                    yield _Segment(id, self._encoder.encode_documents([text])[0], place)
                cursor = behind
            if whole_pass and not found:
                raise UsageError(f"source {self.name!r}: a whole pass over the stream left no document to train on")
            epoch, cursor = epoch + 1, self._start
