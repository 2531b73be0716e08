"""From sources to prepared data: what is dropped and why, what is held out, what is kept, and what is refused."""

import errno
import json
import os
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import Corpus, source
from mai_thinking.config.data import DataSection
from mai_thinking.data import Loader, PreparedData, documents, prepare
from mai_thinking.data.accounting import left_out_table
from mai_thinking.data.tokenizer import END_OF_TEXT
from mai_thinking.errors import DataError, UsageError

Make = Callable[..., DataSection]
FEW_BYTES = {"vocab_size": 400, "training_bytes": 4000}
"""So that a tokenizer is trained on the head of a stream alone."""


def training_text(prepared: PreparedData, name: str) -> str:
    tokens = prepared.sources[name].tokens
    return prepared.tokenizer.decode([int(token) for token in tokens])


def dropped(prepared: PreparedData, name: str) -> dict[str, int]:
    counts = prepared.manifest["sources"][name]["counts"]
    return {rule: documents for rule, (documents, _) in counts["dropped"].items()}


def test_every_rule_takes_what_it_should_and_counts_it(corpus: Corpus, section: Make) -> None:
    good = corpus.documents(30)
    original = corpus.document(200)
    words = original.split(" ")
    planted = [
        good[0],  # the same text
        "  ".join(good[1].split(" ")) + "\n\n",  # but for white space
        " ".join(["changed", *words[1:]]),  # nearly the same as `original`
        "short",
        "12 34 56 78 90 " * 20,
        "x" * 3000 + " " + corpus.document(),
        "the same line\n" * 400,
    ]
    path = corpus.jsonl("all.jsonl", [*good, original, *planted])
    prepared = prepare(section(source("all", path, held_out=False)))
    assert dropped(prepared, "all") == {
        "exact_duplicates": 2, "near_duplicates": 1,
        "min_bytes": 1, "min_alphabetic": 1, "max_line": 1, "max_compression": 1,
    }  # fmt: skip
    counts = prepared.manifest["sources"]["all"]["counts"]
    assert counts["read"][0] == 38
    assert counts["kept"][0] == 31


def test_the_first_source_keeps_a_text_that_two_have(corpus: Corpus, section: Make) -> None:
    texts = corpus.documents(30)
    first, second = corpus.jsonl("a.jsonl", texts[:20]), corpus.jsonl("b.jsonl", texts[10:])
    prepared = prepare(section(source("a", first, held_out=False), source("b", second, held_out=False)))
    assert dropped(prepared, "a") == {}
    assert dropped(prepared, "b") == {"exact_duplicates": 10}


def test_held_out_documents_are_in_no_training_text(corpus: Corpus, section: Make, tmp_path: Path) -> None:
    """Whole ones are set apart; where a training document quotes one, or a benchmark, the quotation is cut out."""
    texts = corpus.documents(100)
    path = corpus.jsonl("a.jsonl", texts)
    plain = prepare(section(source("a", path)))
    held_out = plain.held_out["general"]
    assert 0 < sum(d.size for d in held_out) <= 0.06 * sum(len(text.encode()) for text in texts)
    question = corpus.sentence(20)
    (tmp_path / "benchmark.json").write_text(json.dumps([{"question": question}]))
    quoting = [f"{corpus.document(80)}\n{quoted}\n{corpus.document(80)}" for quoted in (held_out[0].text, question)]
    corpus.jsonl("b.jsonl", quoting)
    prepared = prepare(
        section(
            source("a", path),
            source("b", tmp_path / "b.jsonl", held_out=False),
            cleaning={"benchmarks": [str(tmp_path / "benchmark.json")], "near_duplicates": None},
        )
    )
    assert [d.text for d in prepared.held_out["general"]] == [d.text for d in held_out]
    trained = training_text(prepared, "b")
    for quoted in (held_out[0].text, question):
        run = quoted.split()
        assert not any(" ".join(run[i : i + 13]) in " ".join(trained.split()) for i in range(len(run) - 12))
    assert prepared.manifest["sources"]["b"]["counts"]["cut"]["decontamination"][0] == 2
    assert "".join(trained.split())[:100] in "".join(("<|endoftext|>" + quoting[0]).split())


def test_the_choice_of_what_is_held_out_depends_on_neither_weight_nor_company(corpus: Corpus, section: Make) -> None:
    path = corpus.jsonl("a.jsonl", corpus.documents(100))
    other = corpus.jsonl("b.jsonl", corpus.documents(10))
    alone = prepare(section(source("a", path)))
    together = prepare(section(source("b", other, category="code"), source("a", path, weight=9)))
    assert [d.text for d in alone.held_out["general"]] == [d.text for d in together.held_out["general"]]


def test_the_cache_is_used_and_a_damaged_one_is_made_again(corpus: Corpus, section: Make) -> None:
    config = section(source("a", corpus.jsonl("a.jsonl", corpus.documents(40))))
    said: list[str] = []
    first = prepare(config, log=said.append)
    assert said
    said.clear()
    assert prepare(config, log=said.append).key == first.key
    assert said == []
    victim = first.folder / "a.tokens.npy"
    victim.write_bytes(victim.read_bytes()[:-8])
    again = prepare(config, log=said.append)
    assert "damaged (a.tokens.npy has changed)" in said[0]
    assert again.content == first.content
    corpus.jsonl("a.jsonl", corpus.documents(41))
    assert prepare(config).key != first.key


def test_the_mixture_table_adds_up(two_sources: PreparedData) -> None:
    table = two_sources.mixture(10_000)
    rows = table.records()
    assert [row["share"] for row in rows] == [0.75, 0.25]
    assert sum(row["training tokens"] for row in rows) == 10_000
    for row in rows:
        assert row["unique tokens"] == len(two_sources.sources[row["source"]].tokens)
    assert f"{7500 / rows[0]['unique tokens']:.3f}" in table.markdown()


def test_all_formats_give_the_same_documents(corpus: Corpus, section: Make, tmp_path: Path) -> None:
    texts = corpus.documents(20)
    pq.write_table(pa.table({"body": texts}), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text)
    kinds = [
        source("x", corpus.jsonl("a.jsonl", texts)),
        source("x", tmp_path / "a.parquet", kind="parquet", text_field="body"),
        source("x", tmp_path / "texts", kind="text"),
    ]
    contents = {training_text(prepare(section(kind | {"held_out": False})), "x") for kind in kinds}
    assert len(contents) == 1


def test_a_stream_gives_the_cleaned_text_after_its_held_out_head(corpus: Corpus, section: Make) -> None:
    texts = corpus.documents(60)
    path = corpus.jsonl("a.jsonl", [*texts[:40], texts[3], "short", *texts[40:]])
    held_out = {"max_bytes": 3000}
    prepared = prepare(section(source("a", path, streaming=True), held_out=held_out))
    head = len(prepared.held_out["general"])
    assert [d.text for d in prepared.held_out["general"]] == texts[:head]
    with Loader(prepared, context_length=32, micro_batch_size=1, rows_per_step=1) as loader:
        seen: list[str] = []
        while len(seen) < 60 - head:
            seen += [name for row in next(loader).document_ids for name in row if name not in seen]
    names = [f"a/a.jsonl:{line}" for line in range(head + 1, 63) if line not in (41, 42)]
    assert sorted(seen) == sorted(names)


def test_a_stream_counts_what_it_drops_and_goes_on_anywhere(corpus: Corpus, section: Make) -> None:
    """One document is far longer than a row, and a null, a duplicate and a short one are on the way."""
    texts = corpus.documents(40)
    path = corpus.jsonl("a.jsonl", [*texts[:20], corpus.document(1200), "short", texts[15], *texts[20:]])
    path.write_text(path.read_text().replace("short", "", 1) + '{"text": null}\n')
    prepared = prepare(section(source("a", path, streaming=True), held_out={"max_bytes": 3000}))

    def loader() -> Loader:
        return Loader(prepared, context_length=32, micro_batch_size=1, rows_per_step=1, prefetch=0)

    with loader() as first:
        rows, states = [], []
        for _ in range(1000):
            rows.append(next(first))
            states.append(json.loads(json.dumps(first.state_dict())))
        left_out = {str(row) for row in first.left_out()}
    for index in (0, 150, 300, 301, 980):
        with loader() as resumed:
            resumed.load_state_dict(states[index])
            again = next(resumed)
        assert again.document_ids == rows[index + 1].document_ids
        assert torch.equal(again.micro_batches[0]["labels"], rows[index + 1].micro_batches[0]["labels"])
    for rule in ("null", "min_bytes", "exact_duplicates"):
        assert re.search(rf"^a: {rule} dropped \d of \d+ documents streamed so far$", "\n".join(left_out), re.MULTILINE)


def test_a_late_bad_line_of_a_stream_is_told_apart(corpus: Corpus, section: Make) -> None:
    """So that a run can save what it has."""
    path = corpus.jsonl("a.jsonl", corpus.documents(60))
    path.write_text(path.read_text() + "{\n")
    prepared = prepare(section(source("a", path, streaming=True), held_out={"max_bytes": 3000}, tokenizer=FEW_BYTES))
    with Loader(prepared, context_length=32, micro_batch_size=1, rows_per_step=1, prefetch=2) as loader:
        next(loader)
        with pytest.raises(DataError, match=r"a\.jsonl, line 61: not valid JSON"):
            deque(loader, maxlen=0)


def test_a_changed_stream_is_another(corpus: Corpus, section: Make) -> None:
    texts = corpus.documents(60)
    config = section(source("a", corpus.jsonl("a.jsonl", texts), streaming=True), held_out={"max_bytes": 3000})
    first = prepare(config)
    corpus.jsonl("a.jsonl", [*texts, "more"])
    assert prepare(config).content != first.content


def test_what_is_left_out_is_told(corpus: Corpus, section: Make, tmp_path: Path) -> None:
    """On the console, each time, and in a table."""
    texts = corpus.documents(30)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "readme.md").write_text("notes")
    corpus.jsonl("folder/a.jsonl", [*texts, "x" * 3000 + " " + texts[0]])
    with (tmp_path / "folder" / "a.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    (tmp_path / "b.jsonl").write_text(f'{{"q": "What is that?"}}\n{{"q": "{corpus.sentence(9)}", "a": "4"}}\n')
    config = section(source("a", tmp_path / "folder"), cleaning={"benchmarks": [str(tmp_path / "b.jsonl")]})
    for _ in range(2):
        said: list[str] = []
        prepared = prepare(config, log=said.append)
        assert "data: a: 1 other file passed over: readme.md" in said
        assert any(
            re.match(r"data: a: max_line dropped 1 of 32 documents \(\d kB of \d+ kB\)", line) for line in said
        ), said
        assert "data: a: null dropped 1 of 32 documents (0 B of " in " ".join(said)
        assert "b.jsonl: 1 of 2 records have fewer than 8 words and are not looked for" in " ".join(said)
    assert "| a | max_line dropped 1 of 32 documents" in left_out_table(prepared.left_out)


@pytest.mark.timeout(300)
def test_two_processes_give_the_bytes_of_one(
    corpus: Corpus, section: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage on, in text that spells a special token."""
    monkeypatch.setattr(documents, "_SHARD", 1000)
    texts = [f"\u00e9 {END_OF_TEXT} {text}" for text in corpus.documents(40)]
    texts += [f"{corpus.document(40)}\nthe same line in many of them\n" for _ in range(6)]
    path = corpus.jsonl("a.jsonl", texts)
    stages = {"boilerplate": {"across": 3}, "templates": {}, "semantic": {}, "fuzzy_decontamination": {}}
    found = []
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)), raising=False)
        config = section(source("a", path), cleaning=stages, cache_dir=str(tmp_path / str(cores)))
        found.append({name: file["xxh3"] for name, file in prepare(config).manifest["files"].items()})
    assert found[0] == found[1]


def test_prepared_data_is_found_wherever_the_files_lie(corpus: Corpus, section: Make, tmp_path: Path) -> None:
    path = corpus.jsonl("a.jsonl", corpus.documents(40))
    first = prepare(section(source("a", path)))
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "a.jsonl")
    assert prepare(section(source("a", moved))).key == first.key


@pytest.mark.parametrize("problem", [OSError("32703 requested and 18368 written"), OSError(errno.ENOSPC, "full")])
def test_a_full_disk_is_told(
    corpus: Corpus, section: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, problem: OSError
) -> None:
    def fail(*arguments: Any) -> None:
        raise problem

    config = section(source("a", corpus.jsonl("a.jsonl", corpus.documents(40))))
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fail)
        with pytest.raises(UsageError, match=r"no space left on the disk for .*cache; free some and rerun"):
            prepare(config)
    said: list[str] = []
    prepared = prepare(config, log=said.append)
    assert "going on with the preparation that was interrupted" in " ".join(said)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [prepared.folder]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine, and long enough to be kept"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', r"a\.jsonl, line 2: not UTF-8"),
        (b'{"txt": "fine"}\n', r"line 1: no field 'text'; did you mean 'txt'"),
        (b'{"text": 5}\n', "holds int, not a string"),
        (b"[1]\n", "a JSON object is needed"),
        (b"", "the file is empty"),
        (b"\n\n", "no documents in it"),
        (b'{"text": "short"}\n{"text": "brief"}\n', "`min_bytes` dropped 2 of them"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, section: Make, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        prepare(section(source("a", tmp_path / "a.jsonl")))
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


def test_what_is_not_there_is_named(corpus: Corpus, section: Make, tmp_path: Path) -> None:
    corpus.jsonl("train.jsonl", corpus.documents(5))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 40)
    (tmp_path / "not.parquet").write_text("text")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[dict[str, Any], str]] = [
        (source("a", tmp_path / "trian.jsonl"), r"no such file or folder; did you mean .*train\.jsonl"),
        (source("a", tmp_path / "empty"), r"has no \.jsonl or \.ndjson file"),
        (source("a", tmp_path / "latin.txt", kind="text"), r"not UTF-8 \(byte 3\)"),
        (source("a", tmp_path / "not.parquet", kind="parquet"), "not a readable Parquet file"),
    ]
    for wrong, message in cases:
        with pytest.raises(UsageError, match=message):
            prepare(section(wrong))
