"""A document, the unit in which data is cleaned, held out and shuffled."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

_ENOUGH = 0.9
"""Documents that fit are looked for until this share of the budget is used."""


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

    def __hash__(self) -> int:
        return hash((self.id, self.text))

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())

    @property
    def fingerprint(self) -> int:
        """64 bits of the text, all white space alike: equal for exact duplicates, and the dice of the split."""
        return xxhash.xxh3_64_intdigest(" ".join(self.text.split()).encode())

    def with_text(self, text: str) -> "Document":
        """The same document, with another text."""
        return Document(self.id, text)


class TextStore:
    """A file for the texts of more documents than memory holds; it is gone when the process is."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        path.unlink()
        self._end = 0

    def keep(self, document: Document) -> Document:
        """The same document, its text in the file."""
        content = document.text.encode()
        self._file.write(content)
        self._end += len(content)
        return _StoredDocument(document.id, self, self._end - len(content), len(content), document.fingerprint)

    def read(self, start: int, size: int) -> str:
        """The text at this place."""
        self._file.flush()
        return os.pread(self._file.fileno(), size, start).decode()


class _StoredDocument(Document):
    """What it takes in memory does not depend on its length."""

    __slots__ = ("_fingerprint", "_size", "_start", "_store")

    def __init__(self, id: str, store: TextStore, start: int, size: int, fingerprint: int) -> None:
        self.id, self._store, self._start, self._size, self._fingerprint = id, store, start, size, fingerprint

    @property
    def text(self) -> str:  # type: ignore[override]
        return self._store.read(self._start, self._size)

    @property
    def size(self) -> int:
        return self._size

    @property
    def fingerprint(self) -> int:
        return self._fingerprint

    def with_text(self, text: str) -> Document:
        return self._store.keep(Document(self.id, text))


def until(documents: Iterable[Document], budget: int | None) -> Iterator[Document]:
    """Documents from the first on until `budget` bytes are reached."""
    size = 0
    for document in documents:
        if budget is not None and size >= budget:
            break
        yield document
        size += document.size


def within(documents: Iterable[Document], budget: int) -> list[Document]:
    """Documents from the first on, without those that would exceed `budget`, until it is nearly used."""
    taken, size = [], 0
    for document in documents:
        if size + document.size <= budget:
            taken.append(document)
            size += document.size
        if size >= _ENOUGH * budget:
            break
    return taken
