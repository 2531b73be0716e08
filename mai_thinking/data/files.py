"""Readers of JSONL, Parquet, text and Hub sources, that can go on from any document.

A reader yields `(document, cursor)`; the cursor, plain JSON, is where the next document begins. The three local
formats are read here rather than through `datasets`: a broken JSONL line is named by its number, a position is a byte
offset instead of a replay, and no second copy of the data is written to a cache. Hub names go through `datasets`.
"""

import difflib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from mai_thinking.config.data import SourceSection
from mai_thinking.data.documents import Document
from mai_thinking.errors import UsageError

Cursor = dict[str, Any]

_TEXT_PIECE = 65_536
"""A text file longer than this many characters becomes several documents, cut at blank lines."""


class Reader(Protocol):
    """A source of documents."""

    def check(self) -> None:
        """Raise UsageError for what can be seen without reading everything: a missing file, field or column."""

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[Document, Cursor]]:
        """The documents from `cursor` (default: the first) on, each with the cursor of its successor."""

    def fingerprint(self) -> str:
        """Changes when the content does."""


def open_reader(source: SourceSection) -> Reader:
    """The reader for a source that is not embedded."""
    readers: dict[str, type[JsonlReader | ParquetReader | TextReader | HubReader]] = {
        "jsonl": JsonlReader,
        "parquet": ParquetReader,
        "text": TextReader,
        "hub": HubReader,
    }
    return readers[source.kind](source)


class _FilesReader:
    """What the local formats share: a file, or all files with the right ending in a folder, sorted by name."""

    suffixes: tuple[str, ...] = ()

    def __init__(self, source: SourceSection) -> None:
        self.source = source
        self.root = Path(source.path).expanduser()

    def files(self) -> list[Path]:
        """The files to read; UsageError if there are none, or one is empty."""
        if not self.root.exists():
            raise self._error(f"{self.root}: no such file or folder{_nearest_path(self.root)}")
        files = [self.root] if self.root.is_file() else sorted(p for p in self.root.rglob("*") if self._wanted(p))
        if not files:
            raise self._error(f"{self.root}: the folder has no {' or '.join(self.suffixes) or 'readable'} file")
        for path in files:
            if path.stat().st_size == 0 and self.root.is_file():
                raise self._error(f"{path}: the file is empty")
        return files

    def _wanted(self, path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(self.root).parts)
        return path.is_file() and not hidden and (not self.suffixes or path.suffix in self.suffixes)

    def fingerprint(self) -> str:
        """Names, sizes and times of change."""
        stats = [(str(path.resolve()), path.stat()) for path in self.files()]
        return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    def _name(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()

    def _error(self, problem: str) -> UsageError:
        return UsageError(f"source {self.source.name!r}: {problem}")


class JsonlReader(_FilesReader):
    """One JSON object a line; cursor: {"file", "byte", "line"}."""

    suffixes = (".jsonl", ".ndjson")

    def check(self) -> None:
        """Every file exists and the first line of the first one is good."""
        self.files()
        for _ in itertools.islice(self.read(), 1):
            return
        raise self._error(f"{self.root}: no documents in it")

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[Document, Cursor]]:
        """Documents are named `FILE:LINE`. Blank lines are skipped."""
        at = cursor or {"file": 0, "byte": 0, "line": 0}
        number, byte, line = at["file"], at["byte"], at["line"]
        files = self.files()
        for index in range(number, len(files)):
            path = files[index]
            try:
                with path.open("rb") as file:
                    file.seek(byte)
                    for raw in file:
                        byte, line = byte + len(raw), line + 1
                        if raw.strip():
                            text = self._text(raw, f"{path}, line {line}")
                            yield (
                                Document(f"{self._name(path)}:{line}", text),
                                {"file": index, "byte": byte, "line": line},
                            )
            except OSError as error:
                raise self._error(f"{path}: cannot be read: {error.strerror}") from None
            byte = line = 0

    def _text(self, raw: bytes, where: str) -> str:
        try:
            record = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise self._error(f"{where}: not UTF-8; convert the file") from None
        except ValueError as error:
            problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise self._error(f"{where}: not valid JSON ({problem}); repair or delete the line") from None
        if not isinstance(record, dict):
            raise self._error(f"{where}: a JSON object is needed, not {type(record).__name__}")
        return _field(record, self.source, where)


class TextReader(_FilesReader):
    """Whole files, the long ones in pieces; cursor: {"file", "piece"}."""

    def check(self) -> None:
        """Every file exists."""
        self.files()

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[Document, Cursor]]:
        """Documents are named by file, and by piece where there are several."""
        at = cursor or {"file": 0, "piece": 0}
        first = at["piece"]
        files = self.files()
        for index in range(at["file"], len(files)):
            name, pieces = self._name(files[index]), _pieces(self._content(files[index]))
            for piece in range(first, len(pieces)):
                document = Document(name if len(pieces) == 1 else f"{name}#{piece}", pieces[piece])
                yield document, {"file": index, "piece": piece + 1}
            first = 0

    def _content(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._error(f"{path}: not UTF-8 (byte {error.start}); convert it or leave it out") from None
        except OSError as error:
            raise self._error(f"{path}: cannot be read: {error.strerror}") from None


class ParquetReader(_FilesReader):
    """One document a row; cursor: {"file", "row"}."""

    suffixes = (".parquet",)

    def check(self) -> None:
        """Every file is Parquet and has the column, of strings; one has a row."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = 0
        for path in self.files():
            try:
                schema = pq.read_schema(path)
                rows += pq.read_metadata(path).num_rows
            except (OSError, pa.ArrowException) as error:
                raise self._error(f"{path}: not a readable Parquet file: {_first_line(error)}") from None
            column = self.source.text_field
            if column not in schema.names:
                raise self._error(f"{path}: no column {column!r}{_nearest(column, schema.names, 'text_field')}")
            kind = schema.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise self._error(f"{path}: column {column!r} holds {kind}, not strings")
        if not rows:
            raise self._error(f"{self.root}: no documents in it")

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[Document, Cursor]]:
        """Documents are named `FILE:ROW`. Null rows are skipped."""
        import pyarrow.parquet as pq

        at = cursor or {"file": 0, "row": 0}
        first = at["row"]
        files = self.files()
        for index in range(at["file"], len(files)):
            with pq.ParquetFile(files[index]) as file:
                end = 0
                for group in range(file.num_row_groups):
                    start, end = end, end + file.metadata.row_group(group).num_rows
                    if end <= first:
                        continue
                    texts = self._texts(file, group)
                    for row in range(max(first, start), end):
                        text = texts[row - start]
                        if text is not None:
                            yield Document(f"{self._name(files[index])}:{row}", text), {"file": index, "row": row + 1}
            first = 0

    def _texts(self, file: Any, group: int) -> list[str | None]:
        try:
            column = file.read_row_group(group, columns=[self.source.text_field]).column(0)
            texts: list[str | None] = column.to_pylist()
        except (OSError, UnicodeDecodeError) as error:  # pyarrow's own errors are OSErrors here
            raise self._error(f"{self.root}, row group {group}: cannot be read: {_first_line(error)}") from None
        return texts


class HubReader:
    """A dataset of the Hugging Face Hub, through `datasets`; cursor: {"row"} or, streaming, the library's own state."""

    def __init__(self, source: SourceSection) -> None:
        self.source = source
        self._dataset: Any = None

    def check(self) -> None:
        """The dataset can be found and its first row has the field."""
        for _ in itertools.islice(self.read(), 1):
            return
        raise UsageError(f"source {self.source.name!r}: {self.source.path} has no documents")

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[Document, Cursor]]:
        """Documents are named by row."""
        dataset = self._load()
        row = cursor["row"] if cursor else 0
        streaming = self.source.streaming
        if streaming and cursor:
            dataset.load_state_dict(cursor["state"])
        for record in dataset if streaming else itertools.islice(dataset, row, None):
            text = _field(record, self.source, f"{self.source.path}, row {row}")
            row += 1
            state = {"state": dataset.state_dict()} if streaming else {}
            yield Document(str(row - 1), text), {"row": row, **state}

    def fingerprint(self) -> str:
        """The name alone: the Hub is asked for nothing here."""
        return f"{self.source.path} {self.source.subset} {self.source.split}"

    def _load(self) -> Any:
        # A streaming dataset keeps its position in itself, so each reading gets a new one.
        if self._dataset is not None:
            return self._dataset
        import datasets

        source = self.source
        try:
            dataset = datasets.load_dataset(source.path, source.subset, split=source.split, streaming=source.streaming)
        except Exception as error:
            # datasets and huggingface_hub raise a dozen unrelated types here, for want of network or a wrong name.
            raise UsageError(
                f"source {source.name!r}: cannot load {source.path!r} from the Hub: {_first_line(error)}; "
                "check path, subset, split and the network, or use a local file"
            ) from None
        if not source.streaming:
            self._dataset = dataset
        return dataset


def _field(record: dict[str, Any], source: SourceSection, where: str) -> str:
    """The text of a record."""
    name = source.text_field
    if name not in record:
        raise UsageError(
            f"source {source.name!r}: {where}: no field {name!r}{_nearest(name, list(record), 'text_field')}"
        )
    text = record[name]
    if not isinstance(text, str):
        raise UsageError(f"source {source.name!r}: {where}: field {name!r} holds {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which is no character.
        raise UsageError(f"source {source.name!r}: {where}: field {name!r} holds a broken character") from None
    return text


def _nearest(name: str, names: list[str], key: str) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; set `{key}` to one of: {', '.join(names) or '(none)'}"


def _nearest_path(path: Path) -> str:
    names = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _pieces(text: str) -> list[str]:
    """`text` cut at blank lines into pieces of at most about `_TEXT_PIECE` characters; joined they are `text`."""
    if len(text) <= _TEXT_PIECE:
        return [text]
    pieces, start = [], 0
    while len(text) - start > _TEXT_PIECE:
        end = text.rfind("\n\n", start + 1, start + _TEXT_PIECE) + 2
        if end < start + 2:
            end = text.rfind("\n", start + 1, start + _TEXT_PIECE) + 1 or start + _TEXT_PIECE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
