"""Readers of JSONL, text, Parquet and Hub sources, which can go on from any document.

The Hub goes through `datasets.load_dataset` and, streaming, its own `state_dict`. Files do not: `datasets` changes JSON
lines (see `jsonl`) and the line ends of text, holds a text file of any size as one document, and does not say which row
of which Parquet file cannot be read.
"""

import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mai_thinking.config.data import SourceSection
from mai_thinking.config.names import nearest_path
from mai_thinking.data.jsonl import nearest, read_jsonl, read_text, shown, text_field
from mai_thinking.errors import UsageError

Cursor = dict[str, Any]
"""Plain JSON."""

_TEXT_PIECE = 65_536
"""A text file longer than this many characters becomes several documents, cut at blank lines."""
_ROWS = 1024
"""Rows of a Parquet file that are read at once."""
_SHOWN = 3
"""Names of files in a message."""


class Found(NamedTuple):
    """What a reader yields."""

    id: str
    text: str | None
    """None where the source has a null."""
    behind: Cursor
    """Where the next document begins."""


class Reader(ABC):
    """A source of documents."""

    def __init__(self, source: SourceSection) -> None:
        self.source = source

    @abstractmethod
    def read(self, cursor: Cursor | None = None) -> Iterator[Found]:
        """The documents from `cursor` (default: the first) on."""

    @abstractmethod
    def fingerprint(self, *, times: bool) -> str:
        """Changes when the content does, not when files move. Without `times`: what a place in a stream refers to."""

    def check(self) -> list[str]:
        """Lines on what is passed over. UsageError for what can be seen without reading everything."""
        if next(self.read(), None) is None:
            raise self.error(f"{shown(self.source.path)}: no documents in it")
        return []

    def error(self, problem: str) -> UsageError:
        """A message that names the source."""
        return UsageError(f"source {self.source.name!r}: {problem}")


def open_reader(source: SourceSection) -> Reader:
    """The reader for a source that is not embedded."""
    kinds: dict[str, Callable[[SourceSection], Reader]] = {
        "jsonl": JsonlReader, "parquet": ParquetReader, "text": TextReader, "hub": HubReader,
    }  # fmt: skip
    return kinds[source.kind](source)


class _FilesReader(Reader):
    """What the local formats share: a file, or all files with the right ending in a folder, sorted by name."""

    suffixes: tuple[str, ...] = ()

    def __init__(self, source: SourceSection) -> None:
        super().__init__(source)
        self.root = Path(source.path).expanduser()

    def read(self, cursor: Cursor | None = None) -> Iterator[Found]:
        """The cursor is {"file", …}, of which `read_file` knows the rest."""
        at = cursor or {"file": 0}
        files = self.files()[0]
        for index in range(at["file"], len(files)):
            try:
                for place, text, behind in self.read_file(files[index], at if index == at["file"] else {}):
                    yield Found(self.name(files[index]) + place, text, {"file": index, **behind})
            except UsageError as error:
                raise self.error(str(error)) from None

    @abstractmethod
    def read_file(self, path: Path, at: Cursor) -> Iterator[Found]:
        """One file's documents from `at` (or {}: the first) on; their ids are places in it."""

    def check(self) -> list[str]:
        return self.files()[1] + super().check()

    def files(self) -> tuple[list[Path], list[str]]:
        """The files to read, and lines on those passed over. Hidden ones are never meant."""
        if not self.root.exists():
            near = nearest_path(self.root, self.root.parent.iterdir()) if self.root.parent.is_dir() else ""
            raise self.error(f"{shown(self.root)}: no such file or folder{shown(near)}")
        if not self.root.is_dir():
            if self.root.stat().st_size == 0:
                raise self.error(f"{shown(self.root)}: the file is empty")
            return [self.root], []
        files: list[Path] = []
        others: dict[str, list[str]] = {"other files": [], "empty files": [], "linked folders": []}
        for folder, below, names in os.walk(self.root, onerror=self._refuse):
            below[:] = [name for name in below if not name.startswith(".")]
            others["linked folders"] += [name for name in below if os.path.islink(os.path.join(folder, name))]
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                if self.suffixes and not path.name.lower().endswith(self.suffixes):
                    others["other files"].append(path.name)
                elif not path.exists():
                    raise self.error(f"{shown(path)}: the link leads nowhere; mend or remove it")
                elif path.stat().st_size == 0:
                    others["empty files"].append(path.name)
                else:
                    files.append(path)
        if not files:
            wanted = " or ".join(self.suffixes[:2]) or "readable"
            raise self.error(f"{shown(self.root)}: the folder has no {wanted} file")
        return sorted(files), [_passed_over(kind, names) for kind, names in others.items() if names]

    def fingerprint(self, *, times: bool) -> str:
        """Names, sizes and times of change."""
        found = [(self.name(path), path.stat()) for path in self.files()[0]]
        return json.dumps([(name, s.st_size, s.st_mtime_ns) if times else (name, s.st_size) for name, s in found])

    def name(self, path: Path) -> str:
        """A file's name in the source."""
        return shown(path.name if path == self.root else path.relative_to(self.root))

    def _refuse(self, error: OSError) -> None:
        raise self.error(f"{shown(error.filename)}: cannot be read: {error.strerror}")


class JsonlReader(_FilesReader):
    """One JSON object a line; documents are named `FILE:LINE`, the cursor is {"file", "byte", "line"}."""

    suffixes = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")

    def read_file(self, path: Path, at: Cursor) -> Iterator[Found]:
        for line in read_jsonl(path, byte=at.get("byte", 0), number=at.get("line", 0)):
            text = text_field(line.value, self.source.text_field, f"{shown(path)}, line {line.number}")
            yield Found(f":{line.number}", text, {"byte": line.end, "line": line.number})


class TextReader(_FilesReader):
    """Whole files, long ones in pieces; documents are named `FILE` or `FILE#PIECE`, the cursor is {"file", "piece"}."""

    def read_file(self, path: Path, at: Cursor) -> Iterator[Found]:
        pieces = _pieces(read_text(path))
        for piece in range(at.get("piece", 0), len(pieces)):
            yield Found(f"#{piece}" if len(pieces) > 1 else "", pieces[piece], {"piece": piece + 1})


class ParquetReader(_FilesReader):
    """One document a row; they are named `FILE:ROW`, the cursor is {"file", "row"}."""

    suffixes = (".parquet",)

    def check(self) -> list[str]:
        """Every file is Parquet and has the column, of strings; one has a row."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        files, lines = self.files()
        column, rows = self.source.text_field, 0
        for path in files:
            try:
                schema = pq.read_schema(path)
                rows += pq.read_metadata(path).num_rows
            except (OSError, pa.ArrowException) as error:
                raise self.error(f"{shown(path)}: not a readable Parquet file: {_first_line(error)}") from None
            if schema.names.count(column) != 1:
                twice = f"two columns are called {column!r}; rename one" if column in schema.names else None
                raise self.error(f"{shown(path)}: {twice or f'no column {column!r}{nearest(column, schema.names)}'}")
            kind = schema.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise self.error(f"{shown(path)}: column {column!r} holds {kind}, not strings")
        if not rows:
            raise self.error(f"{shown(self.root)}: no documents in it")
        return lines

    def read_file(self, path: Path, at: Cursor) -> Iterator[Found]:
        import pyarrow.parquet as pq

        row, first = 0, at.get("row", 0)
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS, columns=[self.source.text_field]):
                    for value in batch.column(0):
                        if row >= first:
                            yield Found(f":{row}", value.as_py(), {"row": row + 1})
                        row += 1
        except (OSError, ValueError) as error:  # pyarrow's own errors are among these, and text that is not UTF-8
            where = f"{shown(path)}, column {self.source.text_field!r}, row {row}"
            raise UsageError(f"{where}: cannot be read: {_first_line(error)}; mend or remove the row") from None


class HubReader(Reader):
    """A dataset of the Hugging Face Hub; documents are named by row. The cursor is {"row"} and, streaming, the
    library's own {"state"}."""

    _dataset: Any = None

    def read(self, cursor: Cursor | None = None) -> Iterator[Found]:
        dataset, source = self._load(), self.source
        row = cursor["row"] if cursor else 0
        if source.streaming and cursor:
            dataset.load_state_dict(cursor["state"])
        for record in dataset if source.streaming else itertools.islice(dataset, row, None):
            where = f"source {source.name!r}: {source.path}, row {row}"
            text = text_field(record, source.text_field, where)
            row += 1
            state = {"state": dataset.state_dict()} if source.streaming else {}
            yield Found(str(row - 1), text, {"row": row, **state})

    def fingerprint(self, *, times: bool) -> str:
        """The name alone: the Hub is asked for nothing here."""
        return f"{self.source.path} {self.source.subset} {self.source.split}"

    def _load(self) -> Any:
        source = self.source
        if self._dataset is not None:
            return self._dataset
        try:
            import datasets  # takes seconds

            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised, and told once
            dataset = datasets.load_dataset(source.path, source.subset, split=source.split, streaming=source.streaming)
        except Exception as error:
            # datasets and huggingface_hub raise a dozen unrelated types here, for want of network or a wrong name.
            raise self.error(
                f"cannot load {source.path!r} from the Hub: {_first_line(error)}; "
                "check path, subset, split and the network, or use a local file"
            ) from None
        if not source.streaming:  # a streaming dataset keeps its position in itself, so each reading gets a new one
            self._dataset = dataset
        return dataset


def _passed_over(kind: str, names: list[str]) -> str:
    some = ", ".join([shown(name) for name in sorted(names)[:_SHOWN]] + ["…"][: len(names) > _SHOWN])
    return f"{len(names)} {kind if len(names) > 1 else kind[:-1]} passed over: {some}"


def _pieces(text: str) -> list[str]:
    """`text` cut at blank lines into pieces of at most about `_TEXT_PIECE` characters; joined they are `text`."""
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
