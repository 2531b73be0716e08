"""A checkpoint folder on disk: safetensors and JSON, complete when it is visible, every byte accounted for.

    step-00000100/
        rank-00000.safetensors   the tensors, or shards of tensors, that rank 0 wrote, in the layout that
                                 torch.distributed.checkpoint's safetensors reader understands
        rank-00000.json          the JSON skeletons: what all ranks share (rank 0's file) and what is each rank's own
        manifest.json            step, world size, and size and checksum of every file above
        lineage.json             where it comes from (`mai_thinking.provenance.lineage`), if the run keeps such records

The folder is written as `step-00000100.tmp`, synchronised to the disk and renamed: under its final name it is complete.
Checksums are xxh3-128, which finds accidents at the speed of memory; they are no protection against malice.
All ranks must see the same folder (a shared file system, where there are several machines).
"""

import errno
import fcntl
import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from mai_thinking.config.storage import checksum, synchronise

MANIFEST = "manifest.json"
FORMAT = 1
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_TYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK_BYTES = 8 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step:08d}"


def visible_steps(folder: Path) -> list[int]:
    """The steps of all committed checkpoints, good or damaged, in ascending order."""
    if not folder.is_dir():
        return []
    matches = (_STEP_FOLDER.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what an interrupted save or removal left behind; return the names."""
    leftovers = [*folder.glob("step-*.tmp"), *folder.glob("step-*.removed")] if folder.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path)
    return sorted(path.name for path in leftovers)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; an interruption leaves no half of it visible."""
    hidden = path.with_name(path.name + ".removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`; ValueError if it is missing or not what a manifest is."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except ValueError:
        raise ValueError(f"{MANIFEST} is not valid JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} has another format than this version's ({FORMAT})")
    return manifest


def find_damage(path: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with the checkpoint at `path`, or None if every byte is as it was written. Several ranks may share
    the work: each reads every `shares`-th file, from its `share` on, and sees only the damage in those."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    if manifest["step"] != int(path.name.removeprefix("step-")):
        return f"{MANIFEST} is of step {manifest['step']}"
    for name, expected in sorted(manifest["files"].items())[share::shares]:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        if checksum(file) != expected["xxh3_128"]:
            return f"the checksum of {name} does not match"
    return None


class CheckpointWriter(StorageWriter):
    """Writes one checkpoint for torch.distributed.checkpoint, and commits it.

    DCP plans which rank writes which shard and calls the methods in the order of their definition. `documents` are the
    ranks' JSON files that this rank writes: its own, or in a `jit` checkpoint those of all ranks. `seal` is called on
    the coordinator with the complete folder, before it is committed. The writing loop spends its time in copies, in
    xxhash and in system calls, all outside the interpreter's lock: run in a thread, it takes little from a step.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        rank: int,
        world: int,
        documents: dict[int, bytes],
        seal: Callable[[Path], None] | None = None,
        *,
        jit: bool = False,
    ):
        self.seal = seal
        self.heartbeat: Callable[[], None] = lambda: None
        self.final = step_folder(folder, step)
        self.temporary = self.final.with_name(self.final.name + (".jit.tmp" if jit else ".tmp"))
        self.step, self.rank, self.world, self.documents, self.jit = step, rank, world, documents, jit

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False  # DCP never chooses it on its own

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass  # it serves one checkpoint

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """On the coordinator, make the temporary folder: DCP's plan is exchanged before anyone writes. FileExistsError
        if another rank saves just in time already."""
        if is_coordinator:
            if self.temporary.exists() and not self.jit:
                shutil.rmtree(self.temporary)
            self.temporary.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans  # replicated tensors are already spread over the ranks

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and synchronise this rank's files; the results carry their sizes and checksums."""
        blocks: dict[str, Iterable[bytes | memoryview]]
        blocks = {f"rank-{rank:05d}.json": [document] for rank, document in self.documents.items()}
        if plan.items:
            blocks[f"rank-{self.rank:05d}.safetensors"] = _safetensors_blocks(plan, planner)
        files = {name: self.write_file(name, content) for name, content in blocks.items()}
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(name), of["bytes"], (name, of)) for name, of in files.items()])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all ranks have written: the manifest, and the rename that makes it a checkpoint."""
        files = dict(result.storage_data for of_rank in results for result in of_rank)
        manifest = {"format": FORMAT, "step": self.step, "world_size": self.world, "files": files}
        self.write_file(MANIFEST, [json.dumps(manifest, indent=1).encode()])
        if self.seal is not None:
            self.seal(self.temporary)
        synchronise(self.temporary)
        if self.final.exists():  # damaged, or the same step computed again
            remove_checkpoint(self.final)
        self.temporary.rename(self.final)
        synchronise(self.final.parent)

    def write_file(self, name: str, blocks: Iterable[bytes | memoryview]) -> dict[str, Any]:
        """One file of the checkpoint, from `blocks`; → its size and checksum."""
        digest, size = xxhash.xxh3_128(), 0
        # A rank saves just in time because a process died, which the page cache outlives, and its reader comes at once:
        # no waiting for the disk.
        with _new_file(self.temporary / name, past_cache=not self.jit) as write:
            for chunk in _chunks(blocks):
                self.heartbeat()
                digest.update(chunk)  # while the chunk is in the processor's cache
                write(chunk)
                size += len(chunk)
        return {"bytes": size, "xxh3_128": digest.hexdigest()}


@contextmanager
def _new_file(path: Path, *, past_cache: bool) -> Iterator[Callable[[memoryview], None]]:
    """What writes a chunk to a new file, which is on the disk when the block ends; if `past_cache` is false, only with
    the operating system. Its bytes go past the page cache where the file system lets them (O_DIRECT): filling pages
    costs the processor several times what the disk does. What this does not suit, be it the file system or the length
    of the last chunk, is written in the ordinary way."""
    flags, mode = os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666  # the rights of any new file
    try:
        descriptor = os.open(path, flags | (_DIRECT if past_cache else 0), mode)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = os.open(path, flags, mode)

    def write(chunk: memoryview) -> None:
        if len(chunk) % mmap.PAGESIZE:
            _go_through_cache(descriptor)
        while chunk:
            try:
                chunk = chunk[os.write(descriptor, chunk) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not _go_through_cache(descriptor):
                    raise

    try:
        yield write
        if past_cache:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _go_through_cache(descriptor: int) -> bool:
    """From now on; whether the file went past it before."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)


def _chunks(blocks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The blocks' bytes in one row, `_CHUNK_BYTES` at a time and the rest, each at the start of a page of memory, which
    the next one overwrites."""
    memory = memoryview(mmap.mmap(-1, _CHUNK_BYTES))
    target = np.frombuffer(memory, np.uint8)
    filled = 0
    for block in blocks:
        source = np.frombuffer(block, np.uint8)
        while len(source):
            part = source[: _CHUNK_BYTES - filled]
            target[filled : filled + len(part)] = part  # NumPy lets other threads run meanwhile
            filled, source = filled + len(part), source[len(part) :]
            if filled == _CHUNK_BYTES:
                yield memory
                filled = 0
    if filled:
        yield memory[:filled]


def _safetensors_blocks(plan: SavePlan, planner: SavePlanner) -> Iterable[bytes | memoryview]:
    """The bytes of a safetensors file: its header, then every tensor. DCP's reader takes each shard's place in the
    whole tensor from the header's `DCP_SHARDING_INFO`."""
    header: dict[str, Any] = {}
    offsets: dict[str, Any] = {}
    position = 0
    # Widest type first, so that every tensor is aligned to its own type in the file.
    items: list[tuple[WriteItem, Any]] = [(item, planner.resolve_data(item)) for item in plan.items]
    items.sort(key=lambda pair: (-pair[1].itemsize, pair[0].index.fqn))
    for item, tensor in items:
        assert item.tensor_data is not None
        name, place = item.index.fqn, [position, position + tensor.nbytes]
        header[name] = {"dtype": _TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        position += tensor.nbytes
    assert len(header) == len(items), "one rank holds two shards of one tensor"
    header["__metadata__"] = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in items:
        yield _bytes_of(tensor)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A view of a tensor's elements in row-major order, without a copy where they lie so on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel() <= 1:  # whose stride may be anything, which a view as bytes does not take
        flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    return flat.view(torch.uint8).numpy().data
