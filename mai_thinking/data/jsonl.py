"""The one reader of JSON lines, for documents and for questions, and of text files; both may be gzipped.

`datasets` cannot read them exactly: it turns text that looks like a date into a date, and counts the lines of a broken
file from the start of its own block.
"""

import difflib
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from mai_thinking.errors import UsageError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """A line of a file and what it holds."""

    number: int
    """Counted from 1, as editors do."""
    end: int
    """The byte at which the next line begins."""
    value: Any
    """The JSON value."""


def read_jsonl(path: Path, *, byte: int = 0, number: int = 0) -> Iterator[Line]:
    """The lines of `path` from `byte` on, of which `number` came before.

    Only `\\n` ends a line: U+2028, U+2029 and U+0085 are text, and the `\\r` of Windows is white space. A byte-order
    mark and blank lines are skipped. Raises UsageError with the file, the line and the fix.
    """
    with _opened(path) as file:
        file.seek(byte)
        for raw in file:
            start, byte, number = byte, byte + len(raw), number + 1
            content = raw.removeprefix(_BYTE_ORDER_MARK) if start == 0 else raw
            if content.strip():
                where = f"{shown(path)}, line {number}"
                try:
                    text = content.decode("utf-8")
                except UnicodeDecodeError:
                    raise UsageError(f"{where}: not UTF-8; convert the file") from None
                yield Line(number, byte, _parse(text, where, "repair or delete the line"))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file with its own line ends, without a byte-order mark; UsageError that says why not."""
    with _opened(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown(path)}: not UTF-8 (byte {error.start}); convert it or leave it out") from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, which may be gzipped; UsageError while it cannot be read."""
    try:
        zipped = path.suffix.lower() == ".gz"
        with cast(IO[bytes], gzip.open(path)) if zipped else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"{shown(path)}: cannot be read: {reason}") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file; UsageError as above."""
    return _parse(read_text(path), shown(path), "repair the file")


def _parse(text: str, where: str, fix: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        problem = "nested too deeply"
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg}{f', line {error.lineno}' if error.lineno > 1 else ''})"
    except ValueError as error:
        problem = f"not valid JSON ({str(error).splitlines()[0]})"
    raise UsageError(f"{where}: {problem}; {fix}")


def check_text(text: str, where: str) -> str:
    """`text`, or UsageError if it holds half a surrogate pair: JSON can spell one, but it is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UsageError(f"{where}: half a surrogate pair ({half}), which is no character; mend the line") from None
    return text


def text_field(record: Any, field: str, where: str) -> str | None:
    """The text in a document's `field`, None if it is null. UsageError if there is no such field, or no text in it."""
    if not isinstance(record, Mapping):
        raise UsageError(f"{where}: a JSON object is needed, not {type(record).__name__}")
    if field not in record:
        raise UsageError(f"{where}: no field {field!r}{nearest(field, list(record))}")
    text = record[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UsageError(f"{where}: field {field!r} holds {type(text).__name__}, not a string")
    return check_text(text, f"{where}, field {field!r}")


def shown(path: Path | str) -> str:
    """`path` as text; bytes of its name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def nearest(name: str, names: list[str]) -> str:
    """The end of a message on a field or column that is not there."""
    near = difflib.get_close_matches(name, names, n=1)
    some = ", ".join(f"{name:.40}" for name in names[:8]) + (" …" if len(names) > 8 else "")
    return f"; did you mean {near[0]!r}?" if near else f"; set `text_field` to one of: {some or '(none)'}"
