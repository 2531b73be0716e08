"""Where weights and traces came from: a record beside each of them, and back through its parents to random weights.

`lineage.json` in a model folder, a checkpoint or a folder of traces holds a `Record` of it. A record has the hash of
its canonical JSON for an id, and names its parents by theirs: nothing can change without changing every id below
it. The file repeats the records of all ancestors, so that a copied folder carries its whole descent. Random
weights (a seed and an architecture) are the only root, but for weights or traces that were let in from outside by an
explicit override, which every descendant's record shows.

This finds accidents, and changes by anyone who cannot write a new record as well. It is no signature with a secret key:
whoever distrusts the records trains again from the root's seed, which gives the same weights bit for bit. What shows
and checks the records is `report.lineage`.
"""

import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack

from pydantic import BaseModel, ConfigDict

from mai_thinking.config.storage import atomic_file, checksum
from mai_thinking.errors import UsageError

if TYPE_CHECKING:
    from mai_thinking.data.prepared import PreparedData

RECORD, DATA_MANIFEST = "lineage.json", "data_manifest.json"
_CHECKPOINT_MANIFEST = "manifest.json"
_OVERRIDE = "allow_third_party=true"
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

    @classmethod
    def of(cls, record: Record, parents: "Sequence[Lineage]" = ()) -> "Lineage":
        """The lineage of a new record."""
        id, records, places = record_id(record), dict[str, Record](), dict[str, Path]()
        for parent in parents:
            records |= parent.records
            places |= parent.places
        return cls(id, records | {id: record}, places)

    @property
    def record(self) -> Record:
        """The record that this is the lineage of."""
        return self.records[self.id]

    @property
    def parents(self) -> "list[Lineage]":
        """The lineages of the record's parents, each with the ancestors of all."""
        records = {id: record for id, record in self.records.items() if id != self.id}
        known = {*records, *(record.data.manifest for record in records.values() if record.data)}
        places = {name: place for name, place in self.places.items() if name in known}
        return [Lineage(id, records, places) for id in self.record.parents]


class Fault(NamedTuple):
    """Something that is not as it was recorded."""

    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def random_weights(seed: int, architecture: Mapping[str, Any]) -> Lineage:
    """The root: fresh weights, which follow from a seed and the architecture (`MaiThinkingConfig.to_section()`)."""
    code_version()
    return Lineage.of(Record(kind="random-weights", architecture=dict(architecture), seed=seed))


def require_own(path: Path | str, *, allow_third_party: bool) -> Lineage:
    """The lineage of a model folder, checkpoint or folder of traces that a run wants to start or learn from.

    Reads every byte of its files. UsageError if it has no valid record that leads back to random weights, or a file is
    not as recorded; unless `allow_third_party`, which takes it as it is, under a mark that every descendant carries.
    """
    code_version()
    folder = Path(path).expanduser()
    try:
        lineage = read_lineage(folder)
        faults = list(map(str, file_faults(folder, lineage.record)))
        if not faults:
            return lineage
    except ValueError as error:
        faults = [f"{folder}: {error}"]
    if not allow_third_party:
        raise UsageError(
            f"{faults[0]}; nothing from elsewhere is built on: make it with this project's scripts, or "
            f"set {_OVERRIDE} to let it in under a mark that every descendant shows"
        )
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name one with a model or traces")
    reason = faults[0].removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
    mark = f"{_OVERRIDE} let in {folder.name!r}, which {reason}"
    outside = Lineage.of(Record(kind="third-party", files=hash_files(folder), overrides=(mark,)))
    return Lineage(outside.id, outside.records, {outside.id: folder.absolute()})


def resuming_from(checkpoint: Path, parents: Sequence[Lineage]) -> tuple[list[Lineage], tuple[CodeVersion, ...]]:
    """(parents, versions of the code so far) for the records of a run resumed from its own `checkpoint`.

    They are the checkpoint's, which is where the weights come from, whatever lies where `parents` were found by now;
    of a checkpoint without a record they are `parents`, and no version.
    """
    try:
        lineage = read_lineage(checkpoint)
    except ValueError:
        return list(parents), ()
    return lineage.parents, lineage.record.code


class Origin(TypedDict, total=False):
    """Where a run's models, checkpoints and traces come from."""

    parents: Sequence[Lineage]
    """What the run started from, and learned from where that has a record."""
    config: Path
    """Its config.yaml."""
    data: "PreparedData | Sequence[Source] | None"
    """What it reads: prepared text, or sources; by default nothing."""
    seed: int
    code: Sequence[CodeVersion]
    """What `resuming_from` said of the checkpoint; by default nothing."""


def record_model(folder: Path, *, steps: int, **origin: Unpack[Origin]) -> None:
    """Record a model folder, all files in it; call it as `save_model`'s `record`, so that it comes with the weights.

    Of prepared text, the manifest is put beside the weights.
    """
    data = origin.get("data")
    if data is not None and not isinstance(data, Sequence):
        (folder / DATA_MANIFEST).write_text(stable_manifest(data.manifest), encoding="utf-8")
    _write(folder, "model", hash_files(folder), steps, origin)


def record_checkpoint(folder: Path, **origin: Unpack[Origin]) -> None:
    """Record a checkpoint by its manifest, before it is committed: `Checkpointer(…, seal=…)`."""
    manifest = folder / _CHECKPOINT_MANIFEST
    steps = json.loads(manifest.read_bytes())["step"]
    _write(folder, "checkpoint", {manifest.name: hash_file(manifest)}, steps, origin)


def record_traces(folder: Path, *, parent: Lineage, steps: int | None = None, **origin: Unpack[Origin]) -> None:
    """Record a folder of traces that a run from `parent` writes; again whenever it has grown, on rank 0 when all ranks
    have written.

    Parts are written once: a file that the folder's record has keeps the hash it has there, so that each is read once,
    and a change in between is found later. Files that are gone are forgotten.
    """
    try:
        known = read_lineage(folder).record.files if (folder / RECORD).exists() else {}
    except ValueError as error:
        raise UsageError(f"{folder}: {error}; restore it, or remove the traces and make them again") from None
    origin["parents"] = [parent]
    _write(folder, "traces", hash_files(folder, known), steps, origin)


@functools.cache
def code_version() -> CodeVersion:
    """This package's source as it was when the process first asked, which is when a run starts."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()} {hash_file(path).sha256}\n".encode())
    commit = None
    if (package.parent / ".git").exists():
        try:
            command = ["git", "-C", str(package.parent), "rev-parse", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = None  # no git here, or no commit yet
    return CodeVersion(sha256=digest.hexdigest(), commit=commit)


def stable_manifest(manifest: Mapping[str, Any]) -> str:
    """A prepared folder's manifest without its timings: the same text whenever the data is prepared again."""
    return json.dumps({name: value for name, value in manifest.items() if name != "seconds"}, indent=1, sort_keys=True)


def _write(folder: Path, kind: Kind, files: Mapping[str, FileHash], steps: int | None, origin: Origin) -> None:
    parents, data = origin["parents"], origin.get("data")
    manifest, places = None, dict[str, Path]()
    if data is None or isinstance(data, Sequence):
        sources = data
    else:
        manifest = hashlib.sha256(stable_manifest(data.manifest).encode()).hexdigest()
        places[manifest] = data.folder.absolute()
        sources = [
            Source(
                name=name,
                licence=source["licence"],
                provenance=source["provenance"],
                content=_digest([data.manifest["files"].get(f"{name}.tokens.npy"), source["stream_start"]]),
            )
            for name, source in data.manifest["sources"].items()
        ]
    record = Record(
        kind=kind,
        parents=tuple(dict.fromkeys(parent.id for parent in parents)),
        files=dict(files),
        config=hash_file(origin["config"]).sha256,
        code=tuple(dict.fromkeys([*origin.get("code", ()), code_version()])),
        data=None if sources is None else Data(manifest=manifest, sources=tuple(sources)),
        seed=origin["seed"],
        steps=steps,
        overrides=tuple(dict.fromkeys(mark for parent in parents for mark in parent.record.overrides)),
    )
    lineage = Lineage.of(record, parents)
    write_lineage(folder, Lineage(lineage.id, lineage.records, {**lineage.places, **places}))


def record_id(record: Record) -> str:
    """SHA-256 of a record's canonical JSON: sorted keys, no white space."""
    return _digest(record.model_dump(mode="json"))


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
        lineage = Lineage(tree["id"], records, {**places, tree["id"]: folder.absolute()})
        # Also for what no id covers: the places, and the spelling.
        problem = _problem(lineage) if content == _spell(tree) else "has been changed"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem = "is not a record"
    if problem:
        raise ValueError(f"{RECORD} {problem}")
    return lineage


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
        files = json.loads((folder / _CHECKPOINT_MANIFEST).read_bytes())["files"].items()
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


def _digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _spell(tree: Mapping[str, Any]) -> bytes:
    """`lineage.json` with this content: one spelling only, and a checksum of the whole."""
    content = {name: value for name, value in tree.items() if name != "sha256"}
    return (json.dumps(content | {"sha256": _digest(content)}, indent=1, sort_keys=True) + "\n").encode()
