"""Where weights and traces came from: a record beside each of them, and back through its parents to random weights.

`lineage.json` in a model folder, a checkpoint or a folder of traces holds a `Record` of it. A record has the hash of
its canonical JSON for an id, and names its parents by theirs: nothing can change without changing every id below
it. The file repeats the records of all ancestors, so that a copied folder carries its whole descent. Random
weights (a seed and an architecture) are the only root, but for weights or traces that were let in from outside by an
explicit override, which every descendant's record shows.

    parent = random_weights(seed, architecture) or require_own(folder, allow_third_party=…)     # when the run starts
    record_model(folder, parents=[parent], config=run.config, data=prepared, seed=…, steps=…)
    record_traces(folder, parent=parent, config=run.config, seed=…)                             # whenever it has grown

This finds accidents, and changes by anyone who cannot write a new record as well. It is no signature with a secret key:
whoever distrusts the records trains again from the root's seed, which gives the same weights bit for bit.
"""

import functools
import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from mai_thinking.errors import UsageError
from mai_thinking.provenance.record import (
    CHECKPOINT_MANIFEST,
    RECORD,
    CodeVersion,
    Data,
    FileHash,
    Kind,
    Lineage,
    Record,
    Source,
    digest,
    file_faults,
    hash_file,
    hash_files,
    read_lineage,
    record_id,
    write_lineage,
)

if TYPE_CHECKING:
    from mai_thinking.data.prepared import PreparedData

DATA_MANIFEST = "data_manifest.json"
OVERRIDE = "allow_third_party=true"


# ------------------------------------------------------------------------------------------- what a run starts from


def random_weights(seed: int, architecture: Mapping[str, Any]) -> Lineage:
    """The root: fresh weights, which follow from a seed and the architecture (`MaiThinkingConfig.to_section()`)."""
    code_version()
    return _with_ancestors(Record(kind="random-weights", architecture=dict(architecture), seed=seed), [])


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
    except ValueError as error:
        lineage, faults = None, [f"{folder}: {error}"]
    if lineage is not None and not faults:
        return lineage
    if not allow_third_party:
        raise UsageError(
            f"{faults[0]}; nothing from elsewhere is built on: make it with this project's scripts, or "
            f"set {OVERRIDE} to let it in under a mark that every descendant shows"
        )
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name one with a model or traces")
    files = hash_files(folder)
    reason = faults[0].removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
    mark = f"{OVERRIDE} let in {folder.name!r}, which {reason}"
    outside = _with_ancestors(Record(kind="third-party", files=files, overrides=(mark,)), [])
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


# -------------------------------------------------------------------------------------------------- what a run writes


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
    manifest = folder / CHECKPOINT_MANIFEST
    steps = json.loads(manifest.read_bytes())["step"]
    _write(folder, "checkpoint", {manifest.name: hash_file(manifest)}, steps, origin)


def record_traces(folder: Path, *, parent: Lineage, steps: int | None = None, **origin: Unpack[Origin]) -> None:
    """Record a folder of traces that a run from `parent` writes; again whenever it has grown, on rank 0 when all ranks
    have written.

    Parts are written once: a file that the folder's record has keeps the hash it has there, so that each is read once,
    and a change in between is found later. Files that are gone are forgotten.
    """
    try:
        known = dict(read_lineage(folder).record.files) if (folder / RECORD).exists() else {}
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


# ------------------------------------------------------------------------------------------------------------ details


def _write(folder: Path, kind: Kind, files: Mapping[str, FileHash], steps: int | None, origin: Origin) -> None:
    parents, data = origin["parents"], origin.get("data")
    marks = dict.fromkeys(mark for parent in parents for mark in parent.record.overrides)
    record = Record(
        kind=kind,
        parents=tuple(dict.fromkeys(parent.id for parent in parents)),
        files=dict(files),
        config=hash_file(origin["config"]).sha256,
        code=tuple(dict.fromkeys([*origin.get("code", ()), code_version()])),
        data=_data(data),
        seed=origin["seed"],
        steps=steps,
        overrides=tuple(marks),
    )
    lineage = _with_ancestors(record, parents)
    places = dict(lineage.places)
    if data is not None and not isinstance(data, Sequence) and record.data is not None and record.data.manifest:
        places[record.data.manifest] = data.folder.absolute()
    write_lineage(folder, Lineage(lineage.id, lineage.records, places))


def _with_ancestors(record: Record, parents: Sequence[Lineage]) -> Lineage:
    records = {id: ancestor for parent in parents for id, ancestor in parent.records.items()}
    places = {id: place for parent in parents for id, place in parent.places.items()}
    return Lineage(record_id(record), records | {record_id(record): record}, places)


def _data(data: "PreparedData | Sequence[Source] | None") -> Data | None:
    if data is None:
        return None
    if isinstance(data, Sequence):
        return Data(manifest=None, sources=tuple(data))
    files = data.manifest["files"]
    sources = tuple(
        Source(
            name=name,
            licence=source["licence"],
            provenance=source["provenance"],
            content=digest([files.get(f"{name}.tokens.npy"), source["stream_start"]]),
        )
        for name, source in data.manifest["sources"].items()
    )
    return Data(manifest=hashlib.sha256(stable_manifest(data.manifest).encode()).hexdigest(), sources=sources)
