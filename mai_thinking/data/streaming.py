"""Rows of a source that is read while training, for data larger than memory or disk.

Applied on the fly, document by document: quality filters, decontamination against the held-out text, and exact
deduplication within the last `MEMORY` documents. Not applied: what compares a document with all others, boilerplate,
labels, shuffling.
The held-out documents are the head of the stream; training starts behind them. At its end the stream begins again.
"""

import base64
from collections.abc import Iterator, Mapping
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


class Cleaned(NamedTuple):
    """What a `StreamCleaner` has done so far."""

    recent: tuple[int, ...]
    """Hashes of the documents that it remembers, oldest first."""
    read: int
    dropped: dict[str, int]
    """By rule."""


class StreamCleaner:
    """The per-document rules of a stream. Its memory and its counts are part of the stream's state."""

    def __init__(self, cleaning: CleaningSection, overlap: OverlapIndex | None) -> None:
        self._cleaning, self._overlap = cleaning, overlap
        self.restore(Cleaned((), 0, {}))

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
        self._dropped[rule] = self._dropped.get(rule, 0) + 1
        return None

    def now(self) -> Cleaned:
        """What `restore` goes back to."""
        return Cleaned(tuple(self._recent), self._read, dict(self._dropped))

    def restore(self, done: Cleaned) -> None:
        """Go on from there."""
        self._recent, self._read, self._dropped = dict.fromkeys(done.recent), done.read, dict(done.dropped)

    def _is_duplicate(self, text: str, epoch: int) -> bool:
        if not self._cleaning.exact_duplicates:
            return False
        fingerprint = (Document("", text).fingerprint + epoch) % 2**64
        if fingerprint in self._recent:
            return True
        self._recent[fingerprint] = None
        if len(self._recent) > MEMORY:
            del self._recent[next(iter(self._recent))]
        return False


class _Place(NamedTuple):
    """From where a document is read again."""

    epoch: int
    cursor: Cursor | None
    cleaned: Cleaned
    """Before it."""


class StreamedRows:
    """The rows of a stream, in order only. Its state is the place of the document in which the next row begins, and
    how many of its tokens were in rows before."""

    def __init__(self, source: SourceSection, prepared: PreparedData, *, context_length: int) -> None:
        self.name, self.context_length = source.name, context_length
        self._reader, self._encoder = open_reader(source), prepared.encoder
        self._cleaner = StreamCleaner(prepared.config.cleaning, prepared.overlap)
        self._start: Cursor | None = prepared.manifest["sources"][source.name]["stream_start"]
        """Where training begins, behind the held-out documents."""
        self._begin(_Place(0, self._start, self._cleaner.now()), offset=0)

    def next_row(self) -> Row:
        """The next T + 1 tokens; the last of them is the first of the row after."""
        pieces, ids, missing = list[Tokens](), list[str](), self.context_length
        while missing:
            piece = self._tokens[self._offset : self._offset + missing]
            if len(piece):
                pieces.append(piece)
                ids.append(f"{self.name}/{self._id}")
                self._offset += len(piece)
                missing -= len(piece)
            if self._offset >= len(self._tokens):
                self._next_document()
        return Row(np.concatenate([*pieces, self._tokens[self._offset : self._offset + 1]]), ids)

    def state(self) -> dict[str, Any]:
        """Plain JSON; `restore` with it makes `next_row` give what it would give now. The memory of documents is
        base64 of 64-bit hashes."""
        epoch, cursor, (recent, read, dropped) = self._place
        memory = base64.b64encode(np.array(recent, dtype="<u8").tobytes()).decode()
        at = {"epoch": epoch, "cursor": cursor, "offset": self._offset}
        return {**at, "memory": memory, "read": read, "dropped": dropped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        recent = np.frombuffer(base64.b64decode(state["memory"]), dtype="<u8").tolist()
        cleaned = Cleaned(tuple(recent), state["read"], state["dropped"])
        self._cleaner.restore(cleaned)
        self._begin(_Place(state["epoch"], state["cursor"], cleaned), state["offset"])

    def _begin(self, place: _Place, offset: int) -> None:
        """Read on from `place` once a row is asked for; it begins `offset` tokens into the document there."""
        self._documents, self._place = self._read(place.epoch, place.cursor), place
        self._id, self._tokens, self._offset = "", np.zeros(0, dtype=np.int64), offset

    def _next_document(self) -> None:
        id, tokens, place = next(self._documents)
        self._offset -= len(self._tokens)  # nothing where a place was restored: its document is the next
        self._id, self._tokens, self._place = id, tokens, place

    def _read(self, epoch: int, cursor: Cursor | None) -> Iterator[tuple[str, Tokens, _Place]]:
        """Cleaned documents without end: the name, the tokens, the place."""
        while True:
            whole_pass, found = cursor == self._start, False
            for id, raw, behind in self._reader.read(cursor):
                place = _Place(epoch, cursor, self._cleaner.now())
                text = self._cleaner.clean(raw, epoch)
                if text is not None:
                    found = True
                    yield id, self._encoder.encode_documents([text])[0], place
                cursor = behind
            if whole_pass and not found:
                raise UsageError(f"source {self.name!r}: a whole pass over the stream left no document to train on")
            epoch, cursor = epoch + 1, self._start
