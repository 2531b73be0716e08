"""Readers: one file's text is the same in every format, and what cannot be read is named by file, line and fix."""

import gzip
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import source
from mai_thinking.config.data import SourceSection
from mai_thinking.data.readers import Found, Reader, open_reader
from mai_thinking.errors import UsageError

TEXTS = [
    "one\r\ntwo\r\n\r\nthree\n",
    "next line \u0085, line \u2028 and paragraph \u2029 separators, form feed \f, NUL \x00",
    "a mark inside \ufeff and 👩‍👩‍👧‍👦, e\u0301, <|endoftext|>",
    "2020-01-01T00:00:00Z",
    " spaces around \t",
]

DICTIONARY = pa.dictionary(pa.int32(), pa.string())


def reader(kind: str, path: Path, **more: Any) -> Reader:
    return open_reader(SourceSection.model_validate(source("s", path, kind=kind, **more)))


def write_text(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(b"\xef\xbb\xbf" * (number % 2) + text.encode())
    return folder


def write_jsonl(
    folder: Path, *, escape: bool = True, mark: bytes = b"", end: bytes = b"\n", zipped: bool = False
) -> Path:
    lines = [json.dumps({"n": 1, "text": text}, ensure_ascii=escape).encode() + end for text in TEXTS]
    content = mark + end.join(lines)  # a blank line after each
    path = folder / ("a.jsonl.gz" if zipped else "a.JSONL")
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


def write_parquet(folder: Path, kind: pa.DataType | None = None) -> Path:
    column = pa.array(TEXTS).dictionary_encode() if kind == DICTIONARY else pa.array(TEXTS, kind)
    pq.write_table(pa.table({"n": range(len(TEXTS)), "text": column}), folder / "a [1].parquet", row_group_size=2)
    return folder


WAYS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "text": ("text", write_text),
    "jsonl": ("jsonl", write_jsonl),
    "jsonl in a folder": ("jsonl", lambda folder: write_jsonl(folder).parent),
    "jsonl, nothing escaped": ("jsonl", lambda folder: write_jsonl(folder, escape=False)),
    "jsonl of Windows": ("jsonl", lambda folder: write_jsonl(folder, escape=False, mark=b"\xef\xbb\xbf", end=b"\r\n")),
    "jsonl, gzipped": ("jsonl", lambda folder: write_jsonl(folder, zipped=True)),
    "parquet": ("parquet", write_parquet),
    "parquet, large": ("parquet", lambda folder: write_parquet(folder, pa.large_string())),
    "parquet, views": ("parquet", lambda folder: write_parquet(folder, pa.string_view())),
    "parquet, dictionary": ("parquet", lambda folder: write_parquet(folder, DICTIONARY)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_format_gives_the_same_texts_and_goes_on_anywhere(tmp_path: Path, way: str) -> None:
    kind, write = WAYS[way]
    opened = reader(kind, write(tmp_path))
    assert opened.check() == []
    found = list(opened.read())
    assert [text for _, text, _ in found] == TEXTS
    assert len({id for id, _, _ in found}) == len(TEXTS)
    for index, (_, _, behind) in enumerate(found):
        rest = list(opened.read(json.loads(json.dumps(behind))))
        assert [(id, text) for id, text, _ in rest] == [(id, text) for id, text, _ in found[index + 1 :]]


def test_a_long_text_is_read_in_pieces_that_join_to_it(tmp_path: Path) -> None:
    text = "".join(f"paragraph {n}\r\nof two lines\n\n" * 40 + "x" * 70_000 * (n == 5) for n in range(200))
    (tmp_path / "a.txt").write_bytes(text.encode())
    opened = reader("text", tmp_path / "a.txt")
    found = list(opened.read())
    assert "".join(text or "" for _, text, _ in found) == text
    assert len(found) > 3
    assert list(opened.read(found[1].behind)) == found[2:]


def test_a_null_is_told_apart_from_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    pq.write_table(pa.table({"text": [None, ""]}), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        assert [text for _, text, _ in reader(kind, tmp_path / f"a.{kind}").read()] == [None, ""]


def test_what_a_folder_holds_besides_is_told(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    (folder / ".git").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("a.jsonl", "b.JSONL", ".hidden.jsonl", ".git/c.jsonl", "c.json", "d.txt", "../elsewhere/e.jsonl"):
        (folder / name).write_text('{"text": "a"}\n')
    (folder / "empty.jsonl").touch()
    (folder / "linked").symlink_to(elsewhere)
    opened = reader("jsonl", folder)
    assert opened.check() == [
        "2 other files passed over: c.json, d.txt",
        "1 empty file passed over: empty.jsonl",
        "1 linked folder passed over: linked",
    ]
    assert [id for id, _, _ in opened.read()] == ["a.jsonl:1", "b.JSONL:1"]
    (folder / "dangling.jsonl").symlink_to("/nowhere")
    with pytest.raises(UsageError, match=r"dangling\.jsonl: the link leads nowhere; mend or remove it"):
        opened.check()


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    (tmp_path / name).write_text('{"text": "a"}\n{')
    found = itertools.islice(reader("jsonl", tmp_path).read(), 1)
    assert list(found) == [Found("caf\\xe9.jsonl:1", "a", {"file": 0, "byte": 14, "line": 1})]
    with pytest.raises(UsageError, match=r"caf\\xe9\.jsonl, line 2: not valid JSON") as error:
        list(reader("jsonl", tmp_path).read())
    str(error.value).encode()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a \\ud83d b"}', r"half a surrogate pair \(\\ud83d\)"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply; repair or delete the line"),
        ('{"text": "a"} {"text": "b"}', r"not valid JSON \(Extra data\)"),
        ('{"text": "a"', "not valid JSON"),
        ('{"n": ' + "1" * 5000 + "}", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),  # a mark anywhere but at the beginning
        ('"a"', "a JSON object is needed, not str"),
        ("null", "a JSON object is needed, not NoneType"),
        ('{"text": ["a"]}', "field 'text' holds list, not a string"),
        ('{"Text": "a"}', "no field 'text'; did you mean 'Text'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n', encoding="utf-8")
    opened = reader("jsonl", tmp_path / "a.jsonl")
    opened.check()
    with pytest.raises(UsageError, match=rf"source 's': .*a\.jsonl, line 3.*{problem}") as error:
        list(opened.read())
    assert "\n" not in str(error.value)


def test_a_bad_row_is_named_with_its_shard(tmp_path: Path) -> None:
    (good := pa.table({"text": ["fine"] * 5})).validate()
    pq.write_table(good, tmp_path / "a.parquet")
    bad = pa.array([b"fine", b"caf\xe9", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet, column 'text', row 1: cannot be read"):
        list(reader("parquet", tmp_path).read())
    twice = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet: two columns are called 'text'; rename one"):
        reader("parquet", tmp_path).check()


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, zipped=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"a\.jsonl\.gz: cannot be read"):
        list(reader("jsonl", path).read())
