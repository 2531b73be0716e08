"""Readers of JSONL, text, Parquet and Hub sources, which can go on from any document.

The Hub goes through `datasets.load_dataset` and, streaming, its own `state_dict`. Files do not: `datasets` makes dates
and numbers of JSON lines into other text, changes the line ends of text, holds a text file of any size as one document,
and does not say which line or row of which file cannot be read.
"""

import itertools
import json
import os
from abc import ABC, abstractmethod
from collections import defaultdict
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
    return HubReader(source) if source.kind == "hub" else FilesReader(source)


# --------------------------------------------------------------------------------------------------------------- files


class FilesReader(Reader):
    """A file, or all files with the right ending in a folder, sorted by name. A document's name is its file's, and its
    place there; the cursor is {"file", …}, of which the format knows the rest."""

    def __init__(self, source: SourceSection) -> None:
        super().__init__(source)
        self.root = Path(source.path).expanduser()
        self._suffixes, self._read_file = _FORMATS[source.kind]

    def read(self, cursor: Cursor | None = None) -> Iterator[Found]:
        at = cursor or {"file": 0}
        files = self._files()[0]
        for index in range(at["file"], len(files)):
            here = at if index == at["file"] else {}
            try:
                for place, text, behind in self._read_file(files[index], self.source.text_field, here):
                    yield Found(self._name(files[index]) + place, text, {"file": index, **behind})
            except UsageError as error:
                raise self.error(str(error)) from None

    def check(self) -> list[str]:
        files, passed_over = self._files()
        for path in files if self.source.kind == "parquet" else ():
            if problem := _column_problem(path, self.source.text_field):
                raise self.error(f"{shown(path)}: {problem}")
        return passed_over + super().check()

    def fingerprint(self, *, times: bool) -> str:
        """Names, sizes and times of change."""
        found = [(self._name(path), path.stat()) for path in self._files()[0]]
        return json.dumps([(name, s.st_size, s.st_mtime_ns) if times else (name, s.st_size) for name, s in found])

    def _files(self) -> tuple[list[Path], list[str]]:
        """The files to read, and lines on those passed over. Hidden ones are never meant."""
        if not self.root.exists():
            near = nearest_path(self.root, self.root.parent.iterdir()) if self.root.parent.is_dir() else ""
            raise self.error(f"{shown(self.root)}: no such file or folder{shown(near)}")
        if not self.root.is_dir():
            if self.root.stat().st_size == 0:
                raise self.error(f"{shown(self.root)}: the file is empty")
            return [self.root], []
        found: defaultdict[str, list[Path]] = defaultdict(list)
        for folder, below, names in os.walk(self.root, onerror=self._refuse):
            below[:] = [name for name in below if not name.startswith(".")]
            for path in (Path(folder, name) for name in [*below, *names] if not name.startswith(".")):
                found[self._sort_of(path)].append(path)
        if not found["file"]:
            wanted = " or ".join(self._suffixes[:2]) or "readable"
            raise self.error(f"{shown(self.root)}: the folder has no {wanted} file")
        others = [(sort, found[sort]) for sort in ("other file", "empty file", "linked folder") if found[sort]]
        return sorted(found["file"]), [_passed_over(sort, paths) for sort, paths in others]

    def _sort_of(self, path: Path) -> str:
        if path.is_dir():
            return "linked folder" if path.is_symlink() else "folder"
        if self._suffixes and not path.name.lower().endswith(self._suffixes):
            return "other file"
        if not path.exists():
            raise self.error(f"{shown(path)}: the link leads nowhere; mend or remove it")
        return "file" if path.stat().st_size else "empty file"

    def _name(self, path: Path) -> str:
        return shown(path.name if path == self.root else path.relative_to(self.root))

    def _refuse(self, error: OSError) -> None:
        raise self.error(f"{shown(error.filename)}: cannot be read: {error.strerror}")


def _passed_over(sort: str, paths: list[Path]) -> str:
    some = ", ".join([shown(path.name) for path in sorted(paths)[:_SHOWN]] + ["…"][: len(paths) > _SHOWN])
    return f"{len(paths)} {sort}{'s' if len(paths) > 1 else ''} passed over: {some}"


def _json_lines(path: Path, field: str, at: Cursor) -> Iterator[Found]:
    """One JSON object a line; places are `:LINE`, the cursor is {"byte", "line"}."""
    for line in read_jsonl(path, byte=at.get("byte", 0), number=at.get("line", 0)):
        text = text_field(line.value, field, f"{shown(path)}, line {line.number}")
        yield Found(f":{line.number}", text, {"byte": line.end, "line": line.number})


def _text_pieces(path: Path, field: str, at: Cursor) -> Iterator[Found]:
    """A whole file, or `#PIECE`s of a long one that join to it; the cursor is {"piece"}."""
    text, pieces, start = read_text(path), list[str](), 0
    while len(text) - start > _TEXT_PIECE:
        end = text.rfind("\n\n", start + 1, start + _TEXT_PIECE) + 2
        if end < start + 2:
            end = text.rfind("\n", start + 1, start + _TEXT_PIECE) + 1 or start + _TEXT_PIECE
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    for piece in range(at.get("piece", 0), len(pieces)):
        yield Found(f"#{piece}" if len(pieces) > 1 else "", pieces[piece], {"piece": piece + 1})


def _table_rows(path: Path, column: str, at: Cursor) -> Iterator[Found]:
    """One document a row of Parquet; places are `:ROW`, the cursor is {"row"}."""
    import pyarrow.parquet as pq

    row, first = 0, at.get("row", 0)
    try:
        with pq.ParquetFile(path) as file:
            for value in (value for batch in file.iter_batches(_ROWS, columns=[column]) for value in batch.column(0)):
                if row >= first:
                    yield Found(f":{row}", value.as_py(), {"row": row + 1})
                row += 1
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these, and text that is not UTF-8
        where = f"{shown(path)}, column {column!r}, row {row}"
        raise UsageError(f"{where}: cannot be read: {_first_line(error)}; mend or remove the row") from None


def _column_problem(path: Path, column: str) -> str | None:
    """Why a file is no Parquet, or has no one column of strings of this name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        return f"not a readable Parquet file: {_first_line(error)}"
    if column not in schema.names:
        return f"no column {column!r}{nearest(column, schema.names)}"
    if schema.names.count(column) > 1:
        return f"two columns are called {column!r}; rename one"
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return None
    return f"column {column!r} holds {kind}, not strings"


_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Path, str, Cursor], Iterator[Found]]]] = {
    "jsonl": ((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"), _json_lines),
    "text": ((), _text_pieces),
    "parquet": ((".parquet",), _table_rows),
}
"""Endings of its files, none for any; and what reads one from a place on: names are places in the file."""


# ----------------------------------------------------------------------------------------------------------------- Hub


class HubReader(Reader):
    """A dataset of the Hugging Face Hub; documents are named by row. The cursor is {"row"} and, streaming, the
    library's own {"state"}."""

    _dataset: Any = None

    def read(self, cursor: Cursor | None = None) -> Iterator[Found]:
        dataset, source = self._load(), self.source
        begin = cursor["row"] if cursor else 0
        if source.streaming and cursor:
            dataset.load_state_dict(cursor["state"])
        records = dataset if source.streaming else itertools.islice(dataset, begin, None)
        for row, record in enumerate(records, begin):
            text = text_field(record, source.text_field, f"source {source.name!r}: {source.path}, row {row}")
            state = {"state": dataset.state_dict()} if source.streaming else {}
            yield Found(str(row), text, {"row": row + 1, **state})

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


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
