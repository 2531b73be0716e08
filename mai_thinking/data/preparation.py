"""From sources to tokens on disk: read, clean, hold out, decontaminate, train the tokenizer, encode.

MAI-Thinking-1 report §2.4.
"""

import errno
import importlib.util
import json
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import xxhash
from filelock import FileLock

from mai_thinking.config.data import DataSection, SourceSection
from mai_thinking.config.storage import atomic_folder, checksum
from mai_thinking.data.accounting import LeftOut, Tally, count
from mai_thinking.data.card import CARD, card
from mai_thinking.data.cleaning import clean
from mai_thinking.data.decontamination import SHORTEST, OverlapIndex, read_benchmark
from mai_thinking.data.documents import Document, TextStore, until, within
from mai_thinking.data.embedded import embedded_fingerprint, has_tests, read_embedded
from mai_thinking.data.jsonl import shown
from mai_thinking.data.labels import Labeller, read_examples
from mai_thinking.data.prepared import (
    OVERLAP,
    TOKENIZER,
    PreparedData,
    PreparedSource,
    find_damage,
    save_held_out,
    write_manifest,
)
from mai_thinking.data.readers import Cursor, Reader, open_reader
from mai_thinking.data.streaming import StreamCleaner
from mai_thinking.data.tokenizer import Encoder, architecture_folder, check_lossless, load_tokenizer, train_tokenizer
from mai_thinking.data.words import words_of
from mai_thinking.errors import UsageError

FORMAT = 3
"""Part of every key: one more whenever the same config and input give other tokens or other files. No hash of the code,
since a comment would throw every user's prepared data away."""
_LATER = {"boilerplate", "templates", "semantic", "fuzzy_decontamination", "labels", "drop_order"}
"""Keys that came later: they are no part of the key where they are not used."""
_ENCODE_BATCH = 256
_BY_SOURCE = dict[str, list[Document]]
_Log = Callable[[str], None]


def prepare(config: DataSection, *, sample: float = 1, log: _Log = lambda line: None) -> PreparedData:
    """The prepared data of `config`: from the cache, or made now (the embedded default takes about a minute).

    Of a `sample` of the documents alone, chosen by the hash of their text, where it is less than 1. The same for every
    seed and every rank. Processes that start together make it once. `log` gets a line per phase, and one for all that
    is left out. Raises UsageError for whatever is wrong with the input, before anything long begins.
    """
    config = _without_absent_tests(config, log)
    readers = {source.name: open_reader(source) for source in config.sources if source.kind != "embedded"}
    if (config.cleaning.semantic or config.cleaning.labels) and not importlib.util.find_spec("sklearn"):
        raise UsageError("data.cleaning: semantic and labels need scikit-learn; `pip install 'mai_thinking[corpus]'`")
    passed_over = [LeftOut(name, line) for name, reader in readers.items() for line in reader.check()]
    if config.tokenizer.path is not None:
        check_lossless(load_tokenizer(config.tokenizer.path), f"data.tokenizer.path: {config.tokenizer.path}")
    benchmarks = {path: read_benchmark(Path(path).expanduser()) for path in config.cleaning.benchmarks}
    examples = read_examples(config.cleaning.labels)
    passed_over += _too_short(benchmarks, config.cleaning.decontamination_ngram)
    key = _key(config, readers, sample)
    with _cache(config.cache_dir) as cache, FileLock(cache / f"{key}.lock"):
        folder = cache / key
        damage = find_damage(folder, key) if folder.exists() else "not there"
        if damage:
            if folder.exists():
                log(f"prepared data in {folder} is damaged ({damage}); making it again")
                shutil.rmtree(folder)
            log(f"data: preparing {len(config.sources)} sources, once; they are kept in {shown(cache)}")
            for left_over in cache.glob(f".{key}.*"):
                shutil.rmtree(left_over)
            with atomic_folder(folder) as temporary:
                _Preparation(config, readers, benchmarks, examples, sample, log).build(temporary, key)
    data = PreparedData(folder, config, passed_over)
    for row in data.left_out:
        log(f"data: {row}")
    return data


class _Preparation:
    """One preparation: its documents, its counts, its clock."""

    def __init__(
        self,
        config: DataSection,
        readers: dict[str, Reader],
        benchmarks: dict[str, list[list[str]]],
        examples: dict[str, dict[str, list[str]]],
        sample: float,
        log: _Log,
    ) -> None:
        self.config, self.readers, self.benchmarks, self.sample, self.log = config, readers, benchmarks, sample, log
        self.labellers = {name: Labeller(texts) for name, texts in examples.items()}
        self.tallies = {source.name: Tally() for source in config.sources}
        self.seconds: dict[str, float] = {}
        self.starts: dict[str, Cursor | None] = {}

    def build(self, folder: Path, key: str) -> None:
        """All phases, in order, into the empty `folder`."""
        self.store = TextStore(folder / "texts")
        with self._phase("reading"):
            documents = {s.name: self._load(s) for s in self.config.sources if not s.streaming}
        with self._phase("cleaning"):
            procedural = {s.name for s in self.config.sources if s.provenance == "procedural"}
            code = {s.name for s in self.config.sources if s.category == "code"}
            cleaned = clean(documents, procedural, code, self.config.cleaning, self.tallies)
            documents = self._any_left(cleaned.documents)
        self.seconds |= {f"cleaning: {stage}": seconds for stage, seconds in cleaned.seconds.items()}
        with self._phase("holding out"):
            held_out, documents = self._hold_out(documents)
            save_held_out(folder, _by_category(self.config, held_out))
        with self._phase("decontaminating"):
            overlap = self._overlap_index(held_out)
            if overlap is not None:
                overlap.save(folder / OVERLAP)
                left = {name: self._decontaminate(name, found, overlap) for name, found in documents.items()}
                documents = self._any_left(left)
        with self._phase("training the tokenizer"):
            section = self.config.tokenizer
            if section.path is not None:
                tokenizer = load_tokenizer(section.path)
            else:
                tokenizer = train_tokenizer(self._tokenizer_texts(documents, overlap), section.vocab_size)
            tokenizer.save_pretrained(folder / TOKENIZER)
        with self._phase("encoding"):
            encoder = Encoder(tokenizer)
            tokens = {name: self._encode(folder, name, found, encoder) for name, found in documents.items()}
        manifest = self._manifest(key, tokens, held_out, encoder.vocab_size)
        (folder / CARD).write_text(card(manifest), encoding="utf-8", newline="\n")
        write_manifest(folder, manifest)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 2)
        self.log(f"data: {name} took {self.seconds[name]:.1f} s")

    def _load(self, source: SourceSection) -> list[Document]:
        """All of a source's documents, or those that `max_bytes` leaves."""
        tally = self.tallies[source.name]
        if source.kind == "embedded":
            texts = until(read_embedded(source), source.max_bytes if source.endless else None)
        else:
            texts = self._read(source)
        kept = map(self.store.keep, texts)
        found = [document for document in kept if document.fingerprint < self.sample * 2**64]
        documents, size = count(found)
        tally.read = [documents + tally.dropped.get("null", [0])[0], size]
        found = self._wanted(source, found)
        if source.max_bytes is None:
            return found
        documents, size = count(found)
        chosen = within(sorted(found, key=lambda document: document.fingerprint), source.max_bytes)
        if source.endless:
            tally.read = count(chosen)
        elif len(chosen) < documents:
            tally.drop("max_bytes", size - count(chosen)[1], documents - len(chosen))
        return chosen

    def _read(self, source: SourceSection) -> Iterator[Document]:
        for id, text, _ in self.readers[source.name].read():
            if text is None:
                self.tallies[source.name].drop("null", 0)
            else:
                yield Document(id, text)

    def _wanted(self, source: SourceSection, found: list[Document]) -> list[Document]:
        """Label the documents, and leave those whose labels the source does not want."""
        tally = self.tallies[source.name]
        wanted = [True] * len(found)
        for name, labeller in self.labellers.items():
            for place, label in enumerate(labeller.labels(document.text for document in found)):
                tally.label(f"{name}: {label}", found[place].size)
                wanted[place] &= source.labels.get(name, label) == label
        return tally.sift(found, (None if good else "labels" for good in wanted))

    def _any_left(self, documents: _BY_SOURCE) -> _BY_SOURCE:
        for name, found in documents.items():
            if not found:
                worst = self.tallies[name].worst()
                raise UsageError(f"source {name!r}: {worst}; relax it under `data.cleaning`, or name another source")
        return documents

    def _hold_out(self, documents: _BY_SOURCE) -> tuple[_BY_SOURCE, _BY_SOURCE]:
        """Split each source into (held out, training) by the hash of the text; streams by their head."""
        held_out: _BY_SOURCE = {}
        training: _BY_SOURCE = {}
        for source in self.config.sources:
            name = source.name
            if source.streaming:
                held_out[name], self.starts[name] = self._head_of_stream(source)
            else:
                held_out[name] = self._choose(source, documents[name]) if source.held_out else []
                chosen = {document.id for document in held_out[name]}
                training[name] = [document for document in documents[name] if document.id not in chosen]
        return held_out, training

    def _choose(self, source: SourceSection, found: list[Document]) -> list[Document]:
        if len(found) < 2:
            raise UsageError(
                f"source {source.name!r}: only one document is left after cleaning, so none can be held out; "
                "split it into several, or set the source's `held_out: false`"
            )
        section = self.config.held_out
        budget = min(section.max_bytes, int(section.fraction * count(found)[1]))
        ordered = sorted(found, key=lambda document: document.fingerprint)
        return within(ordered, budget) or [min(ordered, key=lambda document: document.size)]

    def _head_of_stream(self, source: SourceSection) -> tuple[list[Document], Cursor | None]:
        """The first good documents up to the budget, and where the stream goes on."""
        if not source.held_out:
            return [], None
        cleaner = StreamCleaner(self.config.cleaning, None)
        found, size = [], 0
        for id, text, cursor in self.readers[source.name].read():
            if (cleaned := cleaner.clean(text)) is not None:
                found.append(Document(id, cleaned))
                size += found[-1].size
            if size >= self.config.held_out.max_bytes:
                return found, cursor
        raise UsageError(
            f"source {source.name!r}: the whole stream ({size} bytes after cleaning) would be held out; "
            "lower `data.held_out.max_bytes`, or remove `streaming`"
        )

    def _overlap_index(self, held_out: _BY_SOURCE) -> OverlapIndex | None:
        """The runs of words of what is held out. Exercises from one template overlap by design: theirs differ by
        text."""
        texts = [d.text for s in self.config.sources if s.provenance != "procedural" for d in held_out[s.name]]
        texts += [text for records in self.benchmarks.values() for record in records for text in record]
        return OverlapIndex.of(self.config.cleaning, texts)

    def _decontaminate(self, name: str, found: list[Document], overlap: OverlapIndex) -> list[Document]:
        kept, tally = [], self.tallies[name]
        for document in found:
            text = overlap.clean(document.text)
            if text is None:
                tally.drop_document("decontamination", document)
                continue
            kept.append(document if len(text) == len(document.text) else document.with_text(text))
            if kept[-1] is not document:
                tally.shorten("decontamination", document.size - kept[-1].size)
        return kept

    def _tokenizer_texts(self, documents: _BY_SOURCE, overlap: OverlapIndex | None) -> Iterator[str]:
        """Training text in the mixture's proportions, from each source in the order of the texts' hashes."""
        total = sum(source.weight for source in self.config.sources)
        for source in self.config.sources:
            budget = int(self.config.tokenizer.training_bytes * source.weight / total)
            if source.streaming:
                cleaner = StreamCleaner(self.config.cleaning, overlap)
                stream = self.readers[source.name].read(self.starts[source.name])
                cleaned = ((id, cleaner.clean(text)) for id, text, _ in stream)
                chosen = until((Document(id, text) for id, text in cleaned if text is not None), budget)
            else:
                chosen = until(sorted(documents[source.name], key=lambda document: document.fingerprint), budget)
            yield from (document.text for document in chosen)

    def _encode(self, folder: Path, name: str, found: list[Document], encoder: Encoder) -> int:
        """Write a source's tokens; how many they are."""
        dtype = np.uint16 if encoder.vocab_size <= 2**16 else np.uint32
        sizes = []
        with tempfile.TemporaryFile(dir=folder) as file:
            for start in range(0, len(found), _ENCODE_BATCH):
                batch = encoder.encode_documents([document.text for document in found[start : start + _ENCODE_BATCH]])
                for tokens in batch:
                    tokens.astype(dtype).tofile(file)
                    sizes.append(len(tokens))
            offsets = np.cumsum([0, *sizes], dtype=np.int64)
            file.flush()
            tokens = np.memmap(file, dtype=dtype, mode="r")
            PreparedSource(tokens, offsets, [document.id for document in found]).save(folder, name)
        self.tallies[name].kept = count(found)
        return int(offsets[-1])

    def _manifest(self, key: str, tokens: dict[str, int], held_out: _BY_SOURCE, vocab_size: int) -> dict[str, Any]:
        sources = {
            source.name: {
                **source.model_dump(mode="json", exclude={"name"}),
                "counts": asdict(self.tallies[source.name]),
                "held_out": count(held_out[source.name]),
                "tokens": tokens.get(source.name),
                "stream_start": self.starts.get(source.name),
                "stream_content": self.readers[source.name].fingerprint(times=False) if source.streaming else None,
            }
            for source in self.config.sources
        }
        benchmarks = {Path(path).name: len(records) for path, records in self.benchmarks.items()}
        facts = {"key": key, "sources": sources, "benchmarks": benchmarks, "vocab_size": vocab_size}
        return {**facts, "cleaning": self.config.cleaning.model_dump(mode="json"), "seconds": self.seconds}


def _too_short(benchmarks: dict[str, list[list[str]]], n: int | None) -> list[LeftOut]:
    """Benchmarks of which a part cannot be looked for."""
    least = min(n or SHORTEST, SHORTEST)
    found = []
    for path, records in benchmarks.items():
        if few := sum(all(len(words_of(text)) < least for text in record) for record in records):
            what = f"{few:,} of {len(records):,} records have fewer than {least} words and are not looked for"
            found.append(LeftOut(path, what))
    return found


def _by_category(config: DataSection, held_out: _BY_SOURCE) -> _BY_SOURCE:
    """Held-out documents of all sources of a category, named `SOURCE/ID`."""
    found: defaultdict[str, list[Document]] = defaultdict(list)
    for source in config.sources:
        for document in held_out[source.name]:
            found[source.category].append(Document(f"{source.name}/{document.id}", document.text))
    return found


def _without_absent_tests(config: DataSection, log: _Log) -> DataSection:
    """Some distributions of Python leave the standard library's tests out; a mixture does without them then."""
    absent = [s for s in config.sources if s.path == "stdlib-tests" and s.kind == "embedded" and not has_tests()]
    if not absent:
        return config
    if len(absent) == len(config.sources):
        raise UsageError(f"source {absent[0].name!r}: this Python comes without its tests; name another source")
    log(f"data: this Python comes without its tests; the mixture does without {absent[0].name!r}")
    return config.model_copy(update={"sources": tuple(s for s in config.sources if s not in absent)})


@contextmanager
def _cache(cache_dir: str) -> Iterator[Path]:
    """The cache's folder. UsageError where it cannot be written, or the disk is full."""
    cache = Path(cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
        yield cache
    except Exception as error:
        # NumPy and the tokenizers library tell a full disk in words of their own, without an errno.
        full = re.search(r"requested and \d+ written|os error (28|122)\b", str(error))
        if full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"no space left on the disk for {shown(cache)}; free some and rerun") from None
        if isinstance(error, OSError) and str(error.filename or "").startswith(str(cache)):
            problem = f"data.cache_dir: {shown(cache)}: cannot be written: {error.strerror}"
            raise UsageError(f"{problem}; name another folder") from None
        raise


def _key(config: DataSection, readers: dict[str, Reader], sample: float) -> str:
    """16 hex digits that change with the config, the input or the format."""
    tree = config.model_dump(mode="json", exclude={"cache_dir", "down_sample"})
    for section in (tree["cleaning"], *tree["sources"]):
        for name in _LATER & section.keys():
            if not section[name]:
                del section[name]
    for source in tree["sources"]:
        # What files hold counts, not where they lie.
        source["path"] = (
            readers[source["name"]].fingerprint(times=True) if source["name"] in readers else source["path"]
        )
    embedded = [embedded_fingerprint(source) for source in config.sources if source.kind == "embedded"]
    examples = [path for labels in config.cleaning.labels.values() for path in labels.values()]
    files = [Path(path).expanduser() for path in (*config.cleaning.benchmarks, *examples)]
    if config.tokenizer.path is not None:
        files.append(architecture_folder(config.tokenizer.path) / "tokenizer.json")
        del tree["tokenizer"]["path"]
        for source in tree["sources"]:
            del source["weight"]  # which is for learning a tokenizer
    tree["cleaning"]["benchmarks"] = len(config.cleaning.benchmarks)
    content = [FORMAT, tokenizers.__version__, tree, embedded, [checksum(path) for path in files]]
    content += [sample] if sample < 1 else []
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
