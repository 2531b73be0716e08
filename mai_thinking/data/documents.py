"""A document, the unit in which data is cleaned, held out and shuffled, and documents in files, found by numbers."""

import functools
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

_ENOUGH = 0.9
"""Documents that fit are looked for until this share of the budget is used."""
_SHARD = 32_000_000
"""Bytes of text in a shard, which is what one task works on."""
_CHUNK = 4096
"""Records that are kept as Python's tuples, until they become an array."""
BOILERPLATE, DECONTAMINATED = 1 << 24, 2 << 24
"""Numbers of the files of texts that a stage has changed, in its first shard; a source's has the source's place."""
_RECORD = np.dtype([
    ("source", "u4"), ("rank", "u4"), ("shard", "u4"), ("file", "u4"), ("start", "u8"), ("id", "u4"), ("size", "u4"),
    ("fingerprint", "u8"), ("words", "u4"), ("first_word", "u8"),
])  # fmt: skip
"""Of a document: its source's place, its place among all documents, its shard; where its id lies, and the text behind
it, and how many bytes each has; the text's fingerprint; how many words it has, and where their hashes lie in the
shard's file of words."""
Records = NDArray[Any]
"""[documents] of `_RECORD`."""


class Document:
    """A piece of text with a name that is unique in its source."""

    __slots__ = ("id", "text")

    id: str
    """Where it came from: a relative path, a line number, an index."""
    text: str

    def __init__(self, id: str, text: str) -> None:
        self.id, self.text = id, text

    def __repr__(self) -> str:
        return f"Document({self.id!r}, {self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Document) and (self.id, self.text) == (other.id, other.text)

    __hash__ = None  # type: ignore[assignment]

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode())

    @property
    def fingerprint(self) -> int:
        """64-bit hash of the text but for white space: equal for duplicates; orders documents for the split."""
        return xxhash.xxh3_64_intdigest(" ".join(self.text.split()).encode())


class Documents(Sequence[Document]):
    """Documents whose texts lie in files: what they take in memory depends on neither length nor name."""

    def __init__(self, folder: Path, records: Records | None = None) -> None:
        """`folder`: of the files that the records refer to."""
        self.folder = folder
        self.records: Records = np.zeros(0, dtype=_RECORD) if records is None else records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: Any) -> Any:
        """The document at a place; of a slice, a mask or places, `Documents`."""
        if not isinstance(place, int | np.integer):
            return Documents(self.folder, self.records[place])
        _, _, _, file, start, id, size, *_ = self.records[place].item()
        content = os.pread(_opened(self.folder, f"{file}.texts"), id + size, start)
        return Document(content[:id].decode(), content[id:].decode())

    def texts(self) -> Iterator[str]:
        """Each one's text, in order."""
        return (document.text for document in self)

    def words(self) -> Iterator[NDArray[np.uint64]]:
        """Each one's hashed words, in order, once `with_words` has written them down."""
        for shard, first, count in self.records[["shard", "first_word", "words"]].tolist():
            content = os.pread(_opened(self.folder, f"{shard}.words"), 8 * count, 8 * first)
            yield np.frombuffer(content, dtype=np.uint64)

    @property
    def size(self) -> int:
        """Bytes of text."""
        return int(self.records["size"].sum(dtype=np.int64))

    @property
    def counted(self) -> list[int]:
        """[documents, bytes]"""
        return [len(self), self.size]

    def of(self, source: int) -> Self:
        """Those of one source."""
        return self[self.records["source"] == source]

    def by_fingerprint(self) -> Self:
        """In the order of the hashes of their texts."""
        return self[np.argsort(self.records["fingerprint"], kind="stable")]

    def within(self, budget: int) -> Self:
        """In the order of the hashes of their texts, without those that would exceed `budget` bytes, until it is nearly
        used."""
        ordered, taken, used = self.by_fingerprint(), list[int](), 0
        for place, size in enumerate(ordered.records["size"].tolist()):
            if used + size <= budget:
                taken.append(place)
                used += size
            if used >= _ENOUGH * budget:
                break
        return ordered[np.array(taken, dtype=np.int64)]

    def sharded(self) -> Self:
        """The same, ranked as they stand, in shards of consecutive ones."""
        records = self.records.copy()
        ends = np.cumsum(records["size"], dtype=np.int64)
        records["rank"] = np.arange(len(records))
        records["shard"] = (ends - records["size"]) // _SHARD
        return type(self)(self.folder, records)

    def shards(self) -> dict[int, Self]:
        """By their numbers."""
        numbers, starts = np.unique(self.records["shard"], return_index=True)
        bounds = pairwise([*starts.tolist(), len(self)])
        return {int(number): self[begin:end] for number, (begin, end) in zip(numbers, bounds, strict=True)}


@functools.lru_cache(maxsize=128)
def _file(folder: Path, name: str) -> BinaryIO:
    return (folder / name).open("rb", buffering=0)


def _opened(folder: Path, name: str) -> int:
    return _file(folder, name).fileno()


def close_files() -> None:
    """Before their folder is written anew."""
    _file.cache_clear()


class Writer:
    """Writes the texts of a source, or the new ones of a shard, to a file of a folder."""

    def __init__(self, folder: Path, number: int, source: int = 0) -> None:
        self._folder, self._number, self._source = folder, number, source
        # Under a name of its own until it is whole: a machine that was taken for dead may still write the same.
        self._path = folder / f"{number}.{secrets.token_hex(4)}"
        self._file, self._end = self._path.open("wb", buffering=1 << 20), 0
        self._records, self._latest = [np.zeros(0, dtype=_RECORD)], list[tuple[int, ...]]()

    def add(self, document: Document, sample: float = 1) -> None:
        """Behind the last, if it is in a `sample`, by the hash of its text."""
        id, text, fingerprint = document.id.encode(), document.text.encode(), document.fingerprint
        if fingerprint >= sample * 2**64:
            return
        self._file.write(id + text)
        at = self._source, 0, 0, self._number, self._end, len(id), len(text), fingerprint, 0, 0
        self._latest.append(at)
        self._end += len(id) + len(text)
        if len(self._latest) == _CHUNK:
            self._flush()

    def close(self) -> Documents:
        """What was written."""
        self._file.close()
        self._path.replace(self._folder / f"{self._number}.texts")
        self._flush()
        return Documents(self._folder, np.concatenate(self._records))

    def _flush(self) -> None:
        self._records.append(np.array(self._latest, dtype=_RECORD))
        self._latest.clear()


def rewritten(documents: Documents, changes: Iterable[tuple[int, str | None]], number: int) -> dict[str, NDArray[Any]]:
    """The records of a shard in which the documents at these places have other texts, and which are `gone`, where
    nothing is left. The texts go to file `number`."""
    records, gone = documents.records.copy(), np.zeros(len(documents), dtype=np.bool_)
    writer, places = Writer(documents.folder, number), list[int]()
    for place, text in changes:
        if text is None:
            gone[place] = True
        else:
            writer.add(Document(documents[place].id, text))
            places.append(place)
    new = writer.close().records
    for name in ("file", "start", "id", "size", "fingerprint"):
        records[name][places] = new[name]
    return {"records": records, "gone": gone}


def joined(parts: Iterable[Documents], folder: Path) -> Documents:
    """One after the other."""
    return Documents(folder, np.concatenate([np.zeros(0, dtype=_RECORD), *(part.records for part in parts)]))


def until(documents: Iterable[Document], budget: int | None) -> Iterator[Document]:
    """Documents from the first on until `budget` bytes are reached."""
    size = 0
    for document in documents:
        if budget is not None and size >= budget:
            break
        yield document
        size += document.size
