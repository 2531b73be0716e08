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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import xxhash
from filelock import FileLock

from mai_thinking.config.data import DataSection, SourceSection
from mai_thinking.config.storage import atomic_folder, checksum
from mai_thinking.data.accounting import CARD, LeftOut, Tally, card
from mai_thinking.data.cleaning import Cleaning, Stage
from mai_thinking.data.decontamination import OverlapIndex, decontaminated, read_benchmark, too_short
from mai_thinking.data.documents import Document, Documents, Writer, joined, until
from mai_thinking.data.embedded import embedded_fingerprint, read_embedded, without_absent_tests
from mai_thinking.data.jsonl import shown
from mai_thinking.data.labels import Labeller, read_examples
from mai_thinking.data.prepared import (
    OVERLAP,
    TOKENIZER,
    PreparedData,
    find_damage,
    save_held_out,
    save_source,
    write_manifest,
)
from mai_thinking.data.readers import Cursor, Reader, open_reader
from mai_thinking.data.streaming import StreamCleaner
from mai_thinking.data.tokenizer import Encoder, architecture_folder, check_lossless, load_tokenizer, train_tokenizer
from mai_thinking.data.work import Arrays, Work
from mai_thinking.errors import UsageError

FORMAT = 5
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
    config = without_absent_tests(config, log)
    readers = {source.name: open_reader(source) for source in config.sources if source.kind != "embedded"}
    if (config.cleaning.semantic or config.cleaning.labels) and not importlib.util.find_spec("sklearn"):
        raise UsageError("data.cleaning: semantic and labels need scikit-learn; `pip install 'mai_thinking[corpus]'`")
    passed_over = [LeftOut(name, line) for name, reader in readers.items() for line in reader.check()]
    if config.tokenizer.path is not None:
        check_lossless(load_tokenizer(config.tokenizer.path), f"data.tokenizer.path: {config.tokenizer.path}")
    benchmarks = {path: read_benchmark(Path(path).expanduser()) for path in config.cleaning.benchmarks}
    examples = read_examples(config.cleaning.labels)
    passed_over += too_short(benchmarks, config.cleaning.decontamination_ngram)
    key = _key(config, readers, sample)
    with _cache(config.cache_dir) as cache, FileLock(cache / f"{key}.lock"):
        folder = cache / key
        damage = find_damage(folder, key) if folder.exists() else "not there"
        if damage:
            if folder.exists():
                log(f"prepared data in {folder} is damaged ({damage}); making it again")
                shutil.rmtree(folder)
            log(f"data: preparing {len(config.sources)} sources, once; they are kept in {shown(cache)}")
            if (place := cache / f".{key}.work").exists():
                log(f"going on with the preparation that was interrupted; remove {place} to begin anew")
            _remove(set(cache.glob(f".{key}.*")) - {place})
            with Work(place, config.ray) as work:
                try:
                    with atomic_folder(folder) as temporary:
                        _Preparation(config, readers, benchmarks, examples, sample, work, log).build(temporary, key)
                except UsageError:
                    _remove({place})  # which other input cannot use
                    raise
        _remove(set(cache.glob(f".{key}.*")))
    data = PreparedData(folder, config, passed_over)
    for row in data.left_out:
        log(f"data: {row}")
    return data


def _remove(folders: set[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Preparation:
    """One preparation: its documents, its counts, its clock. What it has done lies in a folder after every stage: the
    records of the documents that are left, and the counts. So a killed one goes on with the stage that it was in."""

    config: DataSection
    readers: dict[str, Reader]
    benchmarks: dict[str, list[list[str]]]
    examples: dict[str, dict[str, list[str]]]
    sample: float
    work: Work
    log: _Log

    def __post_init__(self) -> None:
        self.names = [source.name for source in self.config.sources]
        self.tallies = {name: Tally() for name in self.names}
        self.seconds: dict[str, float] = {}
        self.starts: dict[str, Cursor] = {}
        sources = list(enumerate(self.config.sources))
        procedural = {place for place, source in sources if source.provenance == "procedural"}
        code = {place for place, source in sources if source.category == "code"}
        self.cleaning = Cleaning(self.config.cleaning, self.tallies, procedural, code, self.work)
        self.labellers = {name: Labeller(texts) for name, texts in self.examples.items()}

    def build(self, folder: Path, key: str) -> None:
        """All phases, in order, into the empty `folder`."""
        documents, order = Documents(self.work.texts), self.config.cleaning.drop_order
        prepared = [source.name for source in self.config.sources if not source.streaming]
        for name in sorted(prepared, key=lambda name: (*order, name).index(name)):  # the highest rank first
            documents = self._stage(f"reading: {name}", partial(self._read, name), documents)
        documents = documents.sharded()
        for rule, stage in self.cleaning.stages().items():
            documents = self._stage(f"cleaning: {rule}", stage, documents)
        self._check_any_left(documents)
        with self._phase("holding out"):
            held_out, documents = self._hold_out(documents)
            save_held_out(folder, _by_category(self.config, held_out))
        overlap = self._overlap_index(held_out)
        if overlap is not None:
            overlap.save(folder / OVERLAP)
            documents = self._stage("decontaminating", partial(self._decontaminate, overlap), documents)
            self._check_any_left(documents)
        with self._phase("training the tokenizer"):
            section = self.config.tokenizer
            if section.path is not None:
                tokenizer = load_tokenizer(section.path)
            else:
                tokenizer = train_tokenizer(self._tokenizer_texts(documents, overlap), section.vocab_size)
            tokenizer.save_pretrained(folder / TOKENIZER)
        with self._phase("encoding"):
            encoder = Encoder(tokenizer)
            tokens = self._encode(folder, documents, encoder)
        manifest = self._manifest(key, tokens, held_out, encoder.vocab_size)
        (folder / CARD).write_text(card(manifest), encoding="utf-8", newline="\n")
        write_manifest(folder, manifest)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Take the time; a stage's is part of its phase's."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        for part in dict.fromkeys((name.partition(":")[0], name)):
            self.seconds[part] = round(self.seconds.get(part, 0) + seconds, 2)
        self.log(f"data: {name} took {seconds:.1f} s")

    def _stage(self, name: str, stage: Stage, documents: Documents) -> Documents:
        """What `stage` leaves of the documents; from the folder, where a killed preparation has done it."""
        folder = self.work.folder / name.replace(": ", "-")
        if not folder.exists():
            with self._phase(name):
                documents = stage(documents)
            with atomic_folder(folder) as temporary:
                np.save(temporary / "records.npy", documents.records)
                tallies = {source: asdict(tally) for source, tally in self.tallies.items()}
                (temporary / "counts.json").write_text(json.dumps([tallies, self.seconds]))
            self.work.forget_parts()
            return documents
        tallies, self.seconds = json.loads((folder / "counts.json").read_text())
        for source, tally in tallies.items():
            vars(self.tallies[source]).update(tally)  # stages know them
        return Documents(self.work.texts, np.load(folder / "records.npy"))

    def _read(self, name: str, before: Documents) -> Documents:
        """With all of a source's documents, or those that `max_bytes` leaves."""
        number = self.names.index(name)
        source, tally = self.config.sources[number], self.tallies[name]
        if source.kind == "embedded":
            limit = source.max_bytes if source.endless else None
            texts: Iterator[tuple[str, str | None]] = ((d.id, d.text) for d in until(read_embedded(source), limit))
        else:
            texts = (row[:2] for row in self.readers[name].read())
        writer = Writer(self.work.texts, number, number)
        for id, text in texts:
            if text is None:
                tally.drop("null", 0)
            else:
                writer.add(Document(id, text), self.sample)
        found = writer.close()
        documents, size = found.counted
        tally.read = [documents + tally.dropped.get("null", [0])[0], size]
        found = self._wanted(source, found)
        if source.max_bytes is not None:
            chosen = found.within(source.max_bytes)
            if source.endless:
                tally.read = chosen.counted
            elif len(chosen) < len(found):
                tally.drop("max_bytes", found.size - chosen.size, len(found) - len(chosen))
            found = chosen
        return joined([before, found], self.work.texts)

    def _wanted(self, source: SourceSection, found: Documents) -> Documents:
        """Label the documents, and leave those whose labels the source does not want."""
        tally = self.tallies[source.name]
        wanted = np.ones(len(found), dtype=np.bool_)
        for name, labeller in self.labellers.items():
            labels = np.array(list(labeller.labels(found.texts())))
            for label in dict.fromkeys(labels.tolist()):
                tally.label(f"{name}: {label}", found[labels == label])
            if name in source.labels:
                wanted &= labels == source.labels[name]
        tally.drop_documents("labels", found[~wanted])
        return found[wanted]

    def _check_any_left(self, documents: Documents) -> None:
        for number, source in enumerate(self.config.sources):
            if not source.streaming and not len(documents.of(number)):
                problem = f"source {source.name!r}: {self.tallies[source.name].worst()}"
                raise UsageError(f"{problem}; relax it under `data.cleaning`, or name another source")

    def _hold_out(self, documents: Documents) -> tuple[_BY_SOURCE, Documents]:
        """Set (held out, training) apart in each source by the hash of the text; streams by their head."""
        held_out: _BY_SOURCE = {name: [] for name in self.names}
        training = np.ones(len(documents), dtype=np.bool_)
        for number, source in enumerate(self.config.sources):
            if source.held_out and source.streaming:
                held_out[source.name], self.starts[source.name] = self._head_of_stream(source)
            elif source.held_out:
                chosen = self._choose(source, documents.of(number))
                held_out[source.name] = list(chosen)
                training &= ~np.isin(documents.records["rank"], chosen.records["rank"])
        return held_out, documents[training]

    def _choose(self, source: SourceSection, found: Documents) -> Documents:
        """What is held out."""
        if len(found) < 2:
            raise UsageError(
                f"source {source.name!r}: only one document is left after cleaning, so none can be held out; "
                "split it into several, or set the source's `held_out: false`"
            )
        section = self.config.held_out
        chosen = found.within(min(section.max_bytes, int(section.fraction * found.size)))
        return chosen if len(chosen) else found[[found.records["size"].argmin()]]

    def _stream(self, source: SourceSection, overlap: OverlapIndex | None) -> Iterator[tuple[Document, Cursor]]:
        """The good documents from where training begins, or from the first on, and where the next one does."""
        cleaner = StreamCleaner(self.config.cleaning, overlap)
        for id, text, cursor in self.readers[source.name].read(self.starts.get(source.name)):
            if (cleaned := cleaner.clean(text)) is not None:
                yield Document(id, cleaned), cursor

    def _head_of_stream(self, source: SourceSection) -> tuple[list[Document], Cursor]:
        """The first good documents up to the budget, and where the stream goes on."""
        found, size = [], 0
        for document, cursor in self._stream(source, None):
            found.append(document)
            size += document.size
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

    def _decontaminate(self, overlap: OverlapIndex, documents: Documents) -> Documents:
        parts = self.work.each("decontamination", partial(decontaminated, overlap), documents)
        return self.cleaning.count_changes("decontamination", documents, parts)

    def _tokenizer_texts(self, documents: Documents, overlap: OverlapIndex | None) -> Iterator[str]:
        """Training text in the mixture's proportions, from each source in the order of the texts' hashes."""
        total = sum(source.weight for source in self.config.sources)
        for source in self.config.sources:
            budget = int(self.config.tokenizer.training_bytes * source.weight / total)
            if source.streaming:
                chosen = until((document for document, _ in self._stream(source, overlap)), budget)
            else:
                chosen = until(documents.of(self.names.index(source.name)).by_fingerprint(), budget)
            yield from (document.text for document in chosen)

    def _encode(self, folder: Path, documents: Documents, encoder: Encoder) -> dict[str, int]:
        """Write each source's tokens; how many they are."""
        counts = {}
        for number, source in enumerate(self.config.sources):
            if source.streaming:
                continue
            found = documents.of(number)
            parts = self.work.each(f"tokens {number}", partial(_tokens, encoder), found)
            offsets = np.append(0, np.cumsum(parts.all("sizes"), dtype=np.int64))
            save_source(folder, source.name, parts.each("tokens"), offsets, (document.id for document in found))
            self.tallies[source.name].kept = found.counted
            counts[source.name] = int(offsets[-1])
        return counts

    def _manifest(self, key: str, tokens: dict[str, int], held_out: _BY_SOURCE, vocab_size: int) -> dict[str, Any]:
        sources = {
            source.name: {
                **source.model_dump(mode="json", exclude={"name"}),
                "counts": asdict(self.tallies[source.name]),
                "held_out": [len(held_out[source.name]), sum(document.size for document in held_out[source.name])],
                "tokens": tokens.get(source.name),
                "stream_start": self.starts.get(source.name),
                "stream_content": self.readers[source.name].fingerprint(times=False) if source.streaming else None,
            }
            for source in self.config.sources
        }
        benchmarks = {Path(path).name: len(records) for path, records in self.benchmarks.items()}
        facts = {"key": key, "sources": sources, "benchmarks": benchmarks, "vocab_size": vocab_size}
        return {**facts, "cleaning": self.config.cleaning.model_dump(mode="json"), "seconds": self.seconds}


def _tokens(encoder: Encoder, shard: int, documents: Documents) -> Arrays:
    """The tokens of a shard's documents, one after the other, and how many each has."""
    dtype = np.uint16 if encoder.vocab_size <= 2**16 else np.uint32
    batches = (documents[start : start + _ENCODE_BATCH] for start in range(0, len(documents), _ENCODE_BATCH))
    tokens = [one.astype(dtype) for batch in batches for one in encoder.encode_documents(list(batch.texts()))]
    return {"tokens": np.concatenate(tokens), "sizes": np.array([len(one) for one in tokens], dtype=np.int64)}


def _by_category(config: DataSection, held_out: _BY_SOURCE) -> _BY_SOURCE:
    """Held-out documents of all sources of a category, named `SOURCE/ID`."""
    found: defaultdict[str, list[Document]] = defaultdict(list)
    for source in config.sources:
        for document in held_out[source.name]:
            found[source.category].append(Document(f"{source.name}/{document.id}", document.text))
    return found


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
    tree = config.model_dump(mode="json", exclude={"cache_dir", "down_sample", "ray"})
    for section in (tree["cleaning"], *tree["sources"]):
        for name in [name for name in _LATER if not section.get(name, True)]:
            del section[name]
    for source in tree["sources"]:
        if source["name"] in readers:  # what files hold counts, not where they lie
            source["path"] = readers[source["name"]].fingerprint(times=True)
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
