"""From sources to tokens on disk: read, clean, hold out, decontaminate, train the tokenizer, encode.

MAI-Thinking-1 report §2.3.
"""

import gzip
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import xxhash
from filelock import FileLock

from mai_thinking.config.data import DataSection, SourceSection
from mai_thinking.data.cleaning import Tally, clean
from mai_thinking.data.documents import Document
from mai_thinking.data.embedded import embedded_fingerprint, has_tests, read_embedded
from mai_thinking.data.ngrams import OverlapIndex
from mai_thinking.data.prepared import (
    OVERLAP,
    TOKENIZER,
    PreparedData,
    PreparedSource,
    find_damage,
    save_held_out,
    save_source,
    write_manifest,
)
from mai_thinking.data.readers import Cursor, Reader, open_reader
from mai_thinking.data.streaming import StreamCleaner
from mai_thinking.data.tokenizer import Encoder, load_tokenizer, train_tokenizer
from mai_thinking.errors import UsageError

_ENCODE_BATCH = 256
_HELD_OUT_ENOUGH = 0.9
"""Held-out documents are looked for until this share of the budget is used."""


def prepare(config: DataSection, *, log: Callable[[str], None] = lambda line: None) -> PreparedData:
    """The prepared data of `config`: from the cache, or made now (the embedded default takes about a minute).

    The same for every seed and every rank. Processes that start together make it once. `log` gets a line per phase.
    Raises UsageError for whatever is wrong with the input, before anything long begins.
    """
    config = _without_absent_tests(config, log)
    readers = {source.name: open_reader(source) for source in config.sources if source.kind != "embedded"}
    for reader in readers.values():
        reader.check()
    _check_files_exist(config)
    key = _key(config, readers)
    cache = _make_cache(config.cache_dir)
    folder = cache / key
    with FileLock(cache / f"{key}.lock"):
        damage = find_damage(folder, key) if folder.exists() else "not there"
        if damage:
            if folder.exists():
                log(f"prepared data in {folder} is damaged ({damage}); making it again")
                shutil.rmtree(folder)
            for left_over in cache.glob(f".{key}-*"):
                shutil.rmtree(left_over)
            _build_into(folder, config, key, readers, log)
    return PreparedData(folder, config)


def _build_into(
    folder: Path, config: DataSection, key: str, readers: dict[str, Reader], log: Callable[[str], None]
) -> None:
    """Build beside `folder` and rename: the folder is there whole or not at all."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder.parent))
    try:
        Preparation(config, readers, log).build(temporary, key)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class Preparation:
    """One preparation: its documents, its counts, its clock."""

    def __init__(self, config: DataSection, readers: dict[str, Reader], log: Callable[[str], None]) -> None:
        self.config = config
        self.readers = readers
        self.log = log
        self.tallies = {source.name: Tally() for source in config.sources}
        self.seconds: dict[str, float] = {}
        self.starts: dict[str, Cursor | None] = {}

    def build(self, folder: Path, key: str) -> None:
        """All phases, in order, into the empty `folder`."""
        with self._phase("reading"):
            documents = {s.name: self._load(s) for s in self.config.sources if not s.streaming}
        with self._phase("cleaning"):
            documents = self._clean(documents)
        with self._phase("holding out"):
            held_out, documents = self._hold_out(documents)
            save_held_out(folder, _by_category(self.config, held_out))
        with self._phase("decontaminating"):
            overlap = self._overlap_index(held_out)
            if overlap is not None:
                np.save(folder / OVERLAP, overlap.hashes)
                documents = {name: self._decontaminate(name, found, overlap) for name, found in documents.items()}
        with self._phase("training the tokenizer"):
            tokenizer = self._tokenizer(documents, overlap)
            tokenizer.save_pretrained(folder / TOKENIZER)
        with self._phase("encoding"):
            tokens = {name: self._encode(folder, name, found, Encoder(tokenizer)) for name, found in documents.items()}
        write_manifest(folder, self._manifest(key, tokens, held_out, len(tokenizer)))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)
        self.log(f"data: {name} took {self.seconds[name]:.1f} s")

    def _load(self, source: SourceSection) -> list[Document]:
        """All of a source's documents, or those that `max_bytes` leaves."""
        if source.kind == "embedded":
            found = _take(read_embedded(source), source.max_bytes if source.endless else None)
        else:
            found = []
            for id, text, _ in self.readers[source.name].read():
                if text is None:
                    self.tallies[source.name].drop("null", 0)
                else:
                    found.append(Document(id, text))
        if source.max_bytes is not None:
            found = _within(sorted(found, key=lambda document: document.fingerprint), source.max_bytes)
        self.tallies[source.name].read = _count(found)
        return found

    def _clean(self, documents: dict[str, list[Document]]) -> dict[str, list[Document]]:
        procedural = {s.name: s.provenance == "procedural" for s in self.config.sources}
        kept = clean(
            [(name, procedural[name], found) for name, found in documents.items()], self.config.cleaning, self.tallies
        )
        for name, found in kept.items():
            self._check_any_left(name, found)
        return kept

    def _check_any_left(self, name: str, found: list[Document]) -> None:
        tally = self.tallies[name]
        if not found:
            rule = tally.worst_rule()
            gone = tally.dropped.get(rule, [0, 0])[0]
            raise UsageError(
                f"source {name!r}: none of its {tally.read[0]} documents is left; `{rule}` dropped {gone} of them: "
                "relax it under `data.cleaning`, or name another source"
            )

    def _hold_out(
        self, documents: dict[str, list[Document]]
    ) -> tuple[dict[str, list[Document]], dict[str, list[Document]]]:
        """Split each source into (held out, training) by the hash of the text; streams by their head."""
        held_out: dict[str, list[Document]] = {}
        training: dict[str, list[Document]] = {}
        for source in self.config.sources:
            if source.streaming:
                held_out[source.name], self.starts[source.name] = self._head_of_stream(source)
                continue
            found = documents[source.name]
            chosen = self._choose(source, found) if source.held_out else []
            names = {document.id for document in chosen}
            held_out[source.name] = chosen
            training[source.name] = [document for document in found if document.id not in names]
        return held_out, training

    def _choose(self, source: SourceSection, found: list[Document]) -> list[Document]:
        if len(found) < 2:
            raise UsageError(
                f"source {source.name!r}: only one document is left after cleaning, so none can be held out; "
                "split it into several, or set the source's `held_out: false`"
            )
        section = self.config.held_out
        budget = min(section.max_bytes, int(section.fraction * sum(document.size for document in found)))
        ordered = sorted(found, key=lambda document: document.fingerprint)
        return _within(ordered, budget) or [min(ordered, key=lambda document: document.size)]

    def _head_of_stream(self, source: SourceSection) -> tuple[list[Document], Cursor | None]:
        """The first good documents up to the budget, and where the stream goes on."""
        cleaner = StreamCleaner(self.config.cleaning, None)
        found, size, cursor = [], 0, None
        if not source.held_out:
            return [], None
        for id, text, cursor in self.readers[source.name].read():
            if text is not None and cleaner.clean(text) is not None:
                found.append(Document(id, text))
                size += found[-1].size
            if size >= self.config.held_out.max_bytes:
                return found, cursor
        raise UsageError(
            f"source {source.name!r}: the whole stream ({size} bytes after cleaning) would be held out; "
            "lower `data.held_out.max_bytes`, or remove `streaming`"
        )

    def _overlap_index(self, held_out: dict[str, list[Document]]) -> OverlapIndex | None:
        """The n-grams of what is held out. Exercises from one template overlap by design: theirs differ by text."""
        n = self.config.cleaning.decontamination_ngram
        if n is None:
            return None
        texts = [
            document.text
            for source in self.config.sources
            if source.provenance != "procedural"
            for document in held_out[source.name]
        ]
        for path in self.config.cleaning.benchmarks:
            texts += _strings_in(Path(path).expanduser())
        return OverlapIndex.build(n, texts)

    def _decontaminate(self, name: str, found: list[Document], overlap: OverlapIndex) -> list[Document]:
        kept = []
        for document in found:
            text = overlap.clean(document.text)
            if text is None:
                self.tallies[name].drop("decontamination", document.size)
                continue
            if text != document.text:
                shortened = Document(document.id, text)
                self.tallies[name].cut(document.size - shortened.size)
                document = shortened
            kept.append(document)
        self._check_any_left(name, kept)
        return kept

    def _tokenizer(self, documents: dict[str, list[Document]], overlap: OverlapIndex | None) -> Any:
        section = self.config.tokenizer
        if section.path is not None:
            return load_tokenizer(section.path)
        return train_tokenizer(self._tokenizer_texts(documents, overlap), section.vocab_size)

    def _tokenizer_texts(self, documents: dict[str, list[Document]], overlap: OverlapIndex | None) -> Iterator[str]:
        """Training text in the mixture's proportions, from each source in the order of the texts' hashes."""
        total = sum(source.weight for source in self.config.sources)
        for source in self.config.sources:
            budget = int(self.config.tokenizer.training_bytes * source.weight / total)
            if source.streaming:
                cleaner = StreamCleaner(self.config.cleaning, overlap)
                stream = self.readers[source.name].read(self.starts[source.name])
                cleaned = (Document(d.id, text) for d in stream if d.text and (text := cleaner.clean(d.text)))
                chosen = _take(cleaned, budget)
            else:
                chosen = _take(sorted(documents[source.name], key=lambda document: document.fingerprint), budget)
            yield from (document.text for document in chosen)

    def _encode(self, folder: Path, name: str, found: list[Document], encoder: Encoder) -> int:
        """Write a source's tokens; how many they are."""
        dtype = np.uint16 if encoder.vocab_size <= 2**16 else np.uint32
        parts = []
        for start in range(0, len(found), _ENCODE_BATCH):
            batch = encoder.encode_documents([document.text for document in found[start : start + _ENCODE_BATCH]])
            parts += [tokens.astype(dtype) for tokens in batch]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        save_source(folder, name, PreparedSource(np.concatenate(parts), offsets, [document.id for document in found]))
        self.tallies[name].kept = _count(found)
        return int(offsets[-1])

    def _manifest(
        self, key: str, tokens: dict[str, int], held_out: dict[str, list[Document]], vocab_size: int
    ) -> dict[str, Any]:
        sources = {
            source.name: {
                **source.model_dump(mode="json", exclude={"name"}),
                "counts": asdict(self.tallies[source.name]),
                "held_out": _count(held_out[source.name]),
                "tokens": tokens.get(source.name),
                "stream_start": self.starts.get(source.name),
            }
            for source in self.config.sources
        }
        return {"key": key, "sources": sources, "vocab_size": vocab_size, "seconds": self.seconds}


def _by_category(config: DataSection, held_out: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Held-out documents of all sources of a category, named `SOURCE/ID`."""
    found: dict[str, list[Document]] = {}
    for source in config.sources:
        renamed = [Document(f"{source.name}/{document.id}", document.text) for document in held_out[source.name]]
        if renamed:
            found.setdefault(source.category, []).extend(renamed)
    return found


def _count(documents: list[Document]) -> list[int]:
    return [len(documents), sum(document.size for document in documents)]


def _take(documents: Iterable[Document], budget: int | None) -> list[Document]:
    """Documents from the first on until `budget` bytes are reached."""
    taken, size = [], 0
    for document in documents:
        if budget is not None and size >= budget:
            break
        taken.append(document)
        size += document.size
    return taken


def _within(documents: Iterable[Document], budget: int) -> list[Document]:
    """Documents from the first on, without those that would exceed `budget`, until it is nearly used."""
    taken, size = [], 0
    for document in documents:
        if size + document.size <= budget:
            taken.append(document)
            size += document.size
        if size >= _HELD_OUT_ENOUGH * budget:
            break
    return taken


def _strings_in(path: Path) -> list[str]:
    """Every string in a benchmark file: JSONL, JSON or plain text, also gzipped."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"cleaning.benchmarks: {path}: cannot be read: {error}") from None
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    try:
        if suffix == ".json":
            return _strings(json.loads(text))
        if suffix == ".jsonl":
            return [string for line in text.split("\n") if line.strip() for string in _strings(json.loads(line))]
    except ValueError as error:
        raise UsageError(f"cleaning.benchmarks: {path}: not valid JSON: {error}") from None
    return [text]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [string for child in children for string in _strings(child)]


def _without_absent_tests(config: DataSection, log: Callable[[str], None]) -> DataSection:
    """Some distributions of Python leave the standard library's tests out; a mixture does without them then."""
    absent = [s for s in config.sources if s.path == "stdlib-tests" and s.kind == "embedded" and not has_tests()]
    if not absent:
        return config
    if len(absent) == len(config.sources):
        raise UsageError(f"source {absent[0].name!r}: this Python comes without its tests; name another source")
    log(f"data: this Python comes without its tests; the mixture does without {absent[0].name!r}")
    return config.model_copy(update={"sources": tuple(s for s in config.sources if s not in absent)})


def _make_cache(cache_dir: str) -> Path:
    cache = Path(cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UsageError(f"data.cache_dir: {cache}: cannot be written: {error.strerror}; name another folder") from None


def _check_files_exist(config: DataSection) -> None:
    """The other files that the config names; so that a wrong name is not found out after the cleaning."""
    if config.tokenizer.path is not None:
        load_tokenizer(config.tokenizer.path)
    for path in config.cleaning.benchmarks:
        _strings_in(Path(path).expanduser())


def _key(config: DataSection, readers: dict[str, Reader]) -> str:
    """16 hex digits that change with the config, the input or the code."""
    digest = xxhash.xxh3_64()
    digest.update(config.model_dump_json(exclude={"cache_dir"}).encode())
    for source in config.sources:
        reader = readers.get(source.name)
        digest.update((reader.fingerprint() if reader else embedded_fingerprint(source.path)).encode())
    if config.tokenizer.path is not None:
        digest.update((Path(config.tokenizer.path).expanduser() / "tokenizer.json").read_bytes())
    for path in config.cleaning.benchmarks:
        digest.update(Path(path).expanduser().read_bytes())
    digest.update(tokenizers.__version__.encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()
