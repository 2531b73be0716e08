"""What a `lineage.json` holds, how it is read and written, and what it says of the files beside it.

See `lineage` for what makes records, and `report.lineage` for what shows and checks them.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from mai_thinking.config.storage import atomic_file, checksum

RECORD = "lineage.json"
CHECKPOINT_MANIFEST = "manifest.json"
Kind = Literal["random-weights", "model", "checkpoint", "traces", "third-party"]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileHash(_Fields):
    """One file, as it was recorded."""

    bytes: int
    sha256: str


class CodeVersion(_Fields):
    """The source files of this package, and the git commit if they lie in a repository (which may have changes)."""

    sha256: str
    commit: str | None


class Source(_Fields):
    """One source of what a run learned from."""

    name: str
    licence: str
    provenance: str
    """`human`, `procedural` or `own-model`, as in the config."""
    content: str
    """A hash of what was read."""


class Data(_Fields):
    """What a run learned from."""

    manifest: str | None
    """SHA-256 of the prepared data's manifest as `data_manifest.json` beside the weights has it, without timings."""
    sources: tuple[Source, ...]


class Record(_Fields):
    """Where one thing came from. Its id is `record_id(record)`."""

    format: Literal[1] = 1
    kind: Kind
    parents: tuple[str, ...] = ()
    """Their ids."""
    files: dict[str, FileHash] = {}
    """By path in the folder. A checkpoint's is its manifest alone, which has the checksums of the others."""
    config: str | None = None
    """SHA-256 of the run's `config.yaml`, the resolved config."""
    code: tuple[CodeVersion, ...] = ()
    """Versions of the code that took part: one, unless a run was resumed with another."""
    data: Data | None = None
    seed: int | None = None
    steps: int | None = None
    architecture: dict[str, Any] | None = None
    """Of random weights; whoever descends from them has the same, but for what a later stage may change."""
    overrides: tuple[str, ...] = ()
    """What was let in from outside the lineage, here or in any ancestor."""


@dataclass(frozen=True)
class Lineage:
    """A record together with those of everything that it descends from."""

    id: str
    records: Mapping[str, Record]
    """By id: the record itself and all ancestors."""
    places: Mapping[str, Path]
    """Where files were when they were recorded, by id of the record, or hash of the data's manifest. Hints: no part of
    a record, since folders may be moved."""

    @property
    def record(self) -> Record:
        """The record that this is the lineage of."""
        return self.records[self.id]

    @property
    def parents(self) -> "list[Lineage]":
        """The lineages of the record's parents."""
        return [self._of(id) for id in self.record.parents]

    def _of(self, id: str) -> "Lineage":
        wanted, found = [id], dict[str, Record]()
        while wanted:
            if (name := wanted.pop()) not in found:
                found[name] = self.records[name]
                wanted += found[name].parents
        manifests = {record.data.manifest for record in found.values() if record.data}
        places = {name: place for name, place in self.places.items() if name in found or name in manifests}
        return Lineage(id, found, places)


class Fault(NamedTuple):
    """Something that is not as it was recorded."""

    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def record_id(record: Record) -> str:
    """SHA-256 of a record's canonical JSON: sorted keys, no white space."""
    return digest(record.model_dump(mode="json"))


def read_lineage(folder: Path) -> Lineage:
    """The lineage that `folder` carries, all its ids and marks checked, but no file; ValueError says what is wrong."""
    try:
        content = (folder / RECORD).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"has no record of where it comes from ({RECORD} is missing)") from None
    try:
        tree = json.loads(content)
        records = {id: Record.model_validate(record) for id, record in tree["records"].items()}
        places = {id: Path(os.path.normpath(folder.absolute() / place)) for id, place in tree["places"].items()}
        lineage = Lineage(tree["id"], records, places)
        # Also for what no id covers: the places, and the spelling.
        problem = _problem(lineage) if content == _spell(tree) else "has been changed"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem = "is not a record"
    if problem:
        raise ValueError(f"{RECORD} {problem}")
    return Lineage(lineage.id, lineage.records, {**places, lineage.id: folder.absolute()})


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Put `lineage` into `folder`, whole or not at all, on the disk when this returns."""
    tree = {
        "id": lineage.id,
        "records": {id: found.model_dump(mode="json") for id, found in lineage.records.items()},
        "places": {id: os.path.relpath(place, folder) for id, place in lineage.places.items()},
    }
    with atomic_file(folder / RECORD, durable=True) as path:
        path.write_bytes(_spell(tree))


def _problem(lineage: Lineage) -> str | None:
    """What is wrong with a lineage as it stands in a file: ids, links, roots, marks, provenance."""
    if lineage.id not in lineage.records:
        return "does not hold its own record"
    for id, record in lineage.records.items():
        if record_id(record) != id:
            return f"has been changed: the record of {id[:12]} has another hash"
        if missing := [parent for parent in record.parents if parent not in lineage.records]:
            return f"lacks the record of {missing[0][:12]}"
        if not record.parents and record.kind not in ("random-weights", "third-party"):
            return f"does not lead back to random weights: {id[:12]} has no parents"
        due = {mark for parent in record.parents for mark in lineage.records[parent].overrides}
        if not due <= set(record.overrides) or (record.kind == "third-party" and not record.overrides):
            return f"hides what was let in from outside: {id[:12]} lacks the mark"
        for source in record.data.sources if record.data else ():
            if source.provenance == "third-party-model":
                return f"has a source written by somebody else's model: {source.name}"
    return None


def hash_files(folder: Path, known: Mapping[str, FileHash] | None = None) -> dict[str, FileHash]:
    """Size and SHA-256 of every file below `folder`, but for the record and hidden files; `known` are believed."""
    known = known or {}
    return {name: known[name] if name in known else hash_file(folder / name) for name in _names(folder)}


def file_faults(folder: Path, record: Record, *, complete: bool = True) -> list[Fault]:
    """What in `folder` is not as `record` has it; reads every byte. `complete` also names files not recorded."""
    faults = [fault for name, was in record.files.items() if (fault := _fault(folder / name, was.bytes, was.sha256))]
    if record.kind == "checkpoint":
        if faults:
            return faults
        # Its manifest, which is right, has the checksums of the others.
        files = json.loads((folder / CHECKPOINT_MANIFEST).read_bytes())["files"].items()
        return [fault for name, was in files if (fault := _fault(folder / name, was["bytes"], was["xxh3_128"]))]
    extra = sorted(set(_names(folder)) - set(record.files)) if complete else []
    return faults + [Fault(folder / name, "is not in the record") for name in extra]


def _fault(path: Path, size: int, recorded: str) -> Fault | None:
    """`recorded`: SHA-256 or xxh3, which is shorter."""
    if not path.is_file():
        return Fault(path, "is missing")
    same = path.stat().st_size == size and checksum(path, "sha256" if len(recorded) == 64 else "xxh3_128") == recorded
    return None if same else Fault(path, "has changed since it was recorded")


def _names(folder: Path) -> list[str]:
    """Files below `folder`, relative to it, but for the record, hidden ones and what is being written."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp")
    return sorted(p.as_posix() for p in found if p.as_posix() != RECORD and not any(n[0] == "." for n in p.parts))


def hash_file(path: Path) -> FileHash:
    """Size and SHA-256 of a file."""
    return FileHash(bytes=path.stat().st_size, sha256=checksum(path, "sha256"))


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _spell(tree: Mapping[str, Any]) -> bytes:
    """`lineage.json` with this content: one spelling only, and a checksum of the whole."""
    content = {name: value for name, value in tree.items() if name != "sha256"}
    return (json.dumps(content | {"sha256": digest(content)}, indent=1, sort_keys=True) + "\n").encode()
