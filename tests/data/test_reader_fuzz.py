"""Files that nobody would write on purpose: each is read, and from any place on, or refused in one line. The seeds are
fixed; `pytest -m slow` has a hundred times as many files."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mai_thinking.config.data import DataSection, SourceSection
from mai_thinking.config.tasks import TaskSection
from mai_thinking.data import prepare
from mai_thinking.data.decontamination import read_benchmark
from mai_thinking.data.readers import open_reader
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks import make_task

FIXED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ODD = (
    "<|endoftext|>",
    "\u2028",
    "\x85",
    "\r\n",
    "\0",
    "\ufeff",
    "\ud83d",
    "2024-01-01",
    "#### 7",
    "é",
    "日本語",
    "\u202e",
)
texts = st.text(max_size=30) | st.sampled_from(ODD) | st.lists(st.sampled_from(ODD)).map("".join)
scalars = st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**330) | st.floats() | texts
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=6)
records = st.fixed_dictionaries({"text": texts, "question": scalars, "answer": scalars}) | values
ends = st.sampled_from(
    [b"\n", b"\n", b"\n", b"\r\n", b"\r", b"", b"\n\n", b"\xef\xbb\xbf", b"\xff", b"[" * 2000, b"\x1f\x8b"]
)


@st.composite
def json_lines(draw: st.DrawFn) -> bytes:
    """Lines of JSON, or nearly so."""
    content = b""
    for record in draw(st.lists(records, max_size=8)):
        line = json.dumps(record, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
        content += line + draw(ends)
    return damaged(draw, content) if draw(st.booleans()) else content


def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes of it others, or its end cut off."""
    found = bytearray(content)
    for at, byte in draw(st.lists(st.tuples(st.integers(0, max(0, len(found) - 1)), st.integers(0, 255)), max_size=4)):
        found[at : at + 1] = bytes([byte])
    return bytes(found[: draw(st.integers(0, len(found)))]) if draw(st.booleans()) else bytes(found)


@st.composite
def parquet_files(draw: st.DrawFn, folder: Path) -> bytes:
    """A table with a column `text`, or nearly so."""
    plain = st.text(max_size=20)
    kinds: list[tuple[Any, st.SearchStrategy[Any]]] = [
        *((kind, plain) for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))),
        (pa.string_view(), plain),
        (pa.binary(), st.binary(max_size=20)),
        (pa.int64(), st.integers(-9, 9)),
        (pa.list_(pa.string()), st.lists(plain, max_size=2)),
        (pa.null(), st.none()),
    ]
    kind, cells = draw(st.sampled_from(kinds))
    column = pa.array(draw(st.lists(st.none() | cells, max_size=12)), kind)
    others = pa.array(range(len(column)))
    names = draw(st.sampled_from([["text", "n"], ["text", "n"], ["text", "text"], ["Text", "n"], ["a.b", "text"]]))
    pq.write_table(
        pa.Table.from_arrays([column, others], names),
        folder / "written",
        row_group_size=draw(st.integers(1, 5)),
        compression=draw(st.sampled_from(["none", "snappy", "zstd"])),
    )
    content = (folder / "written").read_bytes()
    return damaged(draw, content) if draw(st.booleans()) else content


def tried(act: Callable[[], Any]) -> Any:
    """What comes out, or None if that is refused in one line."""
    try:
        return act()
    except UsageError as error:
        told = str(error)
    assert "\n" not in told
    assert len(told) < 1_000
    return None


def check_reader(kind: str, path: Path) -> list[str | None] | None:
    """Read all, and again from every place on."""
    fields = {"name": "m", "category": "general", "licence": "CC0-1.0", "provenance": "human", "weight": 1}
    reader = open_reader(SourceSection.model_validate({**fields, "kind": kind, "path": str(path)}))
    if tried(reader.check) is None:
        return None
    found = tried(lambda: list(reader.read()))
    for index, one in enumerate(found or []):
        assert one.text is None or one.text.encode().decode() == one.text
        cursor = json.loads(json.dumps(one.behind))
        assert [(again.id, again.text) for again in reader.read(cursor)] == [(f.id, f.text) for f in found[index + 1 :]]
    return None if found is None else [one.text for one in found]


def check_lines(folder: Path, content: bytes, zipped: bool) -> None:
    path = folder / f"lines.jsonl{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    found = check_reader("jsonl", path)
    # Against Python's own parser, line by line. It takes half a surrogate pair in bytes, which is not UTF-8.
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    try:
        expected = [json.loads(line.decode())["text"] for line in lines] if lines else None
        well = expected is not None and all(isinstance(text, str) and text.encode() for text in expected if text)
    except (ValueError, TypeError, KeyError, RecursionError):
        well = False
    if well and all(isinstance(text, str) for text in expected or []):
        assert found == expected
    tried(lambda: read_benchmark(path))
    task = tried(lambda: make_task(TaskSection(name="t", kind="jsonl", path=str(path))))
    for split in ("train", "held_out"):
        for problem in task.problems[split] if task else ():
            assert task.verify(problem, problem.answer) == 1
    check_reader("text", path)


def check_parquet(folder: Path, content: bytes) -> None:
    path = folder / "table.parquet"
    path.write_bytes(content)
    found = check_reader("parquet", path)
    try:
        expected = pq.read_table(path)["text"].cast(pa.string()).to_pylist()
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return
    assert found is None or found == expected


@settings(FIXED, max_examples=100)
@given(content=json_lines(), zipped=st.booleans())
def test_lines_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, zipped: bool) -> None:
    check_lines(tmp_path_factory.getbasetemp(), content, zipped)


@settings(FIXED, max_examples=15)
@given(data=st.data())
def test_tables_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    check_parquet(folder, data.draw(parquet_files(folder)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(FIXED, max_examples=10_000)
@given(content=json_lines(), zipped=st.booleans())
def test_many_lines(tmp_path_factory: pytest.TempPathFactory, content: bytes, zipped: bool) -> None:
    check_lines(tmp_path_factory.getbasetemp(), content, zipped)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(FIXED, max_examples=1_500)
@given(data=st.data())
def test_many_tables(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    check_parquet(folder, data.draw(parquet_files(folder)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(FIXED, max_examples=300)
@given(documents=st.lists(texts | st.text(min_size=1, max_size=300), min_size=3, max_size=30))
def test_any_documents_are_prepared_or_refused(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> None:
    folder = tmp_path_factory.mktemp("prepared")
    lines = (json.dumps({"text": text}) for text in documents)
    (folder / "m.jsonl").write_text("\n".join(lines))
    source = {"name": "m", "kind": "jsonl", "path": str(folder / "m.jsonl"), "category": "general", "weight": 1}
    tree = {"tokenizer": {"vocab_size": 300}, "cache_dir": str(folder / "cache")}
    sources = [source | {"licence": "CC0-1.0", "provenance": "human"}]
    prepared = tried(lambda: prepare(DataSection.model_validate(tree | {"sources": sources})))
    if prepared is not None:
        encoder = Encoder(prepared.tokenizer)
        for text in documents:
            ids = tried(lambda text=text: encoder.encode(text))
            assert ids is None or prepared.tokenizer.decode(ids) == text
