"""Small corpora of random words, in which two documents share no run of words unless a test plants one."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.config.data import DataSection
from mai_thinking.data import PreparedData, prepare


class Corpus:
    """Makes documents and JSONL files of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.random = random.Random(7)
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.words = ["".join(self.random.choices(letters, k=self.random.randint(3, 9))) for _ in range(3000)]

    def sentence(self, words: int) -> str:
        return " ".join(self.random.choices(self.words, k=words))

    def document(self, words: int = 60) -> str:
        return "\n".join(self.sentence(10) for _ in range(max(words // 10, 1)))

    def documents(self, count: int) -> list[str]:
        return [self.document(self.random.randint(30, 150)) for _ in range(count)]

    def jsonl(self, name: str, texts: list[str]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path


def source(name: str, path: Path | str, **more: Any) -> dict[str, Any]:
    fields = {"kind": "jsonl", "category": "general", "licence": "CC0-1.0", "provenance": "human", "weight": 1.0}
    return {"name": name, "path": str(path), **fields, **more}


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


@pytest.fixture
def section(tmp_path: Path) -> Callable[..., DataSection]:
    """`section(source, …, key=value)`: a DataSection with a small vocabulary and a cache of its own."""

    def make(*sources: dict[str, Any], **more: Any) -> DataSection:
        tree = {"tokenizer": {"vocab_size": 400}, "cache_dir": str(tmp_path / "cache"), "sources": sources, **more}
        return DataSection.model_validate(tree)

    return make


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Prepared data of two sources, weighted 3 : 1."""
    folder = tmp_path_factory.mktemp("two_sources")
    corpus = Corpus(folder)
    first, second = corpus.jsonl("a.jsonl", corpus.documents(60)), corpus.jsonl("b.jsonl", corpus.documents(40))
    tree = {
        "tokenizer": {"vocab_size": 400},
        "cache_dir": str(folder / "cache"),
        "sources": [source("a", first, weight=3), source("b", second, category="code")],
    }
    return prepare(DataSection.model_validate(tree))
