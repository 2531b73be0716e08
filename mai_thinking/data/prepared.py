"""What preparation leaves on disk, and how it is read back."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from mai_thinking.config.data import DataSection
from mai_thinking.config.storage import checksum
from mai_thinking.config.table import Cell, Table
from mai_thinking.data.accounting import LeftOut, Tally
from mai_thinking.data.decontamination import OverlapIndex
from mai_thinking.data.documents import Document
from mai_thinking.data.jsonl import read_jsonl
from mai_thinking.data.tokenizer import Encoder, load_tokenizer

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
HELD_OUT = "held_out"
OVERLAP = "held_out_words.npz"


@dataclass(frozen=True)
class PreparedSource:
    """A source's training tokens."""

    tokens: NDArray[np.unsignedinteger]
    """[tokens] uint16 or uint32, memory-mapped: each document's end-of-text token and its text, one after the other."""
    offsets: NDArray[np.int64]
    """[documents + 1] where each document begins."""
    ids: list[str]
    """[documents] their names."""

    @classmethod
    def load(cls, folder: Path, name: str) -> "PreparedSource":
        """Read them back, the tokens memory-mapped."""
        ids = json.loads((folder / f"{name}.ids.json").read_text(encoding="utf-8"))
        return cls(np.load(folder / f"{name}.tokens.npy", mmap_mode="r"), np.load(folder / f"{name}.offsets.npy"), ids)

    def cut(self, share: float) -> "PreparedSource":
        """About this share of the tokens: documents in the order of their hashes, as many as come nearest to it."""
        hashes = [xxhash.xxh3_64_intdigest(self.tokens[a:b].tobytes()) for a, b in pairwise(self.offsets)]
        sizes = np.diff(self.offsets)
        order = np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")
        ends = np.cumsum(sizes[order])
        count = 1 + int(np.abs(ends - share * ends[-1]).argmin())
        kept = np.sort(order[:count])
        tokens = np.concatenate([self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in kept])
        return PreparedSource(tokens, np.cumsum([0, *sizes[kept]], dtype=np.int64), [self.ids[i] for i in kept])


class PreparedData:
    """A prepared folder: tokenizer, tokens, held-out documents, and the manifest that accounts for all of them.

    The manifest is plain JSON: per source its licence, provenance, and the documents and bytes that each rule
    dropped; the time each phase took; a checksum of each file.
    """

    def __init__(self, folder: Path, config: DataSection, passed_over: Sequence[LeftOut] = ()) -> None:
        """`folder` as `prepare` leaves it; `config` is the one that it was prepared for; `passed_over` is what was not
        even read."""
        self.folder, self.config, self._passed_over = folder, config, passed_over
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))

    @property
    def key(self) -> str:
        """The folder's name: hash of config, input and code."""
        return str(self.manifest["key"])

    @cached_property
    def content(self) -> str:
        """Hash of the training tokens, or of what streams read and where they begin: what a position refers to."""
        sources = self.manifest["sources"].values()
        streams = [(entry["stream_start"], entry["stream_content"]) for entry in sources if entry["streaming"]]
        files = {
            name: entry["xxh3"]
            for name, entry in self.manifest["files"].items()
            if name.endswith(".npy") and (streams or name != OVERLAP)  # documents' names say where a file lay
        }
        cut = [self.config.down_sample] if self.config.down_sample < 1 else []
        return xxhash.xxh3_64_hexdigest(json.dumps([files, streams, *cut], sort_keys=True).encode())

    @property
    def left_out(self) -> list[LeftOut]:
        """What is not learned from, and why: for the console and the report."""
        sources = self.manifest["sources"].items()
        dropped = (LeftOut(name, what) for name, entry in sources for what in Tally(**entry["counts"]).left_out())
        return [*self._passed_over, *dropped]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; `tokenizer.save_pretrained(final)` makes `AutoTokenizer` work there."""
        return load_tokenizer(self.folder / TOKENIZER)

    @cached_property
    def encoder(self) -> Encoder:
        """Encodes any text as training did, also text that spells a special token out."""
        return Encoder(self.tokenizer)

    @cached_property
    def sources(self) -> dict[str, PreparedSource]:
        """Training tokens by name, without the streamed sources; cut to the share that `down_sample` leaves."""
        whole = {s.name: PreparedSource.load(self.folder, s.name) for s in self.config.sources if not s.streaming}
        share = self.config.down_sample
        return whole if share == 1 else {name: source.cut(share) for name, source in whole.items()}

    @cached_property
    def held_out(self) -> dict[str, list[Document]]:
        """Held-out documents by category, as raw text: for bits per byte, and for compressors on the same bytes."""
        paths = sorted((self.folder / HELD_OUT).glob("*.jsonl"))
        return {path.stem: [Document(**line.value) for line in read_jsonl(path)] for path in paths}

    @cached_property
    def overlap(self) -> OverlapIndex | None:
        """What training text must not contain; None where decontamination is off."""
        return OverlapIndex.load(self.folder / OVERLAP, self.config.cleaning)

    def mixture(self, training_tokens: int) -> Table:
        """What a run of `training_tokens` sees of each source (MAI-Thinking-1 report §2.4); tokens include the one that
        opens each document. A stream's unique tokens and epochs are None."""
        names = ["source", "category", "licence", "provenance", "unique tokens", "training tokens", "share", "epochs"]
        rows: list[list[Cell]] = []
        total = sum(source.weight for source in self.config.sources)
        for source in self.config.sources:
            unique = None if source.streaming else len(self.sources[source.name].tokens)
            share = source.weight / total
            tokens = round(training_tokens * source.weight / total)
            counts = [unique, tokens, share, tokens / unique if unique else None]
            rows.append([source.name, source.category, source.licence, source.provenance, *counts])
        return Table(names, rows)


def save_source(
    folder: Path, name: str, tokens: Iterable[NDArray[Any]], offsets: NDArray[np.int64], ids: Iterable[str]
) -> None:
    """Write three files. `tokens`: in pieces, one after the other, as many as `offsets` say."""
    with (folder / f"{name}.tokens.npy").open("wb") as file:
        for place, piece in enumerate(tokens):
            if place == 0:
                header = {"descr": piece.dtype.str, "fortran_order": False, "shape": (int(offsets[-1]),)}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(piece.tobytes())
    np.save(folder / f"{name}.offsets.npy", offsets)
    with (folder / f"{name}.ids.json").open("w", encoding="utf-8") as text:
        text.write("[")
        text.writelines(f"{', ' if place else ''}{json.dumps(id)}" for place, id in enumerate(ids))
        text.write("]")


def save_held_out(folder: Path, held_out: Mapping[str, list[Document]]) -> None:
    """One JSONL per category."""
    (folder / HELD_OUT).mkdir()
    for category, documents in held_out.items():
        lines = [
            json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n" for document in documents
        ]
        (folder / HELD_OUT / f"{category}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest` with a checksum of every other file. The last step: a folder without it is unfinished."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3": checksum(path, "xxh3_64")}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({**manifest, "files": files}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def find_damage(folder: Path, key: str) -> str | None:
    """What is wrong with a prepared folder, or None. Reads every file once, at the disk's speed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["key"] != key:
            return f"{MANIFEST} belongs to {manifest['key']}"
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"] or checksum(path, "xxh3_64") != expected["xxh3"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or cannot be read"
    return None
