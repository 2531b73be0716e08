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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

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


class CheckpointWriter:
    """Writes one checkpoint, each rank its files, and commits it. `seal` is called with the complete folder before it
    is committed. In a `jit` checkpoint one rank writes for all.

    The writing loop spends its time in copies, in xxhash and in system calls, all outside the interpreter's lock: run
    in a thread, it takes little from a step.
    """

    def __init__(self, folder: Path, step: int, seal: Callable[[Path], None] | None = None, *, jit: bool = False):
        self.step, self.seal, self.jit = step, seal, jit
        self.heartbeat: Callable[[], None] = lambda: None
        self.final = step_folder(folder, step)
        self.temporary = self.final.with_name(self.final.name + (".jit.tmp" if jit else ".tmp"))

    def write(
        self, rank: int, tensors: dict[str, Tensor], offsets: dict[str, Sequence[int]], documents: dict[int, bytes]
    ) -> dict[str, Any]:
        """The files of `rank`: its tensors, of which shards have `offsets` in the whole, and the JSON documents of the
        ranks that it writes for. → their sizes and checksums. FileExistsError if another rank saves just in time."""
        self.temporary.mkdir(parents=True, exist_ok=not self.jit)
        blocks: dict[str, Iterable[bytes | memoryview]]
        blocks = {f"rank-{of:05d}.json": [document] for of, document in documents.items()}
        if tensors:
            blocks[f"rank-{rank:05d}.safetensors"] = _safetensors_blocks(tensors, offsets)
        return {name: self.write_file(name, content) for name, content in blocks.items()}

    def finish(self, files: dict[str, Any], world: int) -> None:
        """When all ranks have written: the manifest, and the rename that makes it a checkpoint."""
        manifest = {"format": FORMAT, "step": self.step, "world_size": world, "files": files}
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


def _safetensors_blocks(tensors: dict[str, Tensor], offsets: dict[str, Sequence[int]]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: its header, then every tensor. DCP's reader takes each shard's place in the
    whole tensor from the header's `DCP_SHARDING_INFO`."""
    header: dict[str, Any] = {}
    position = 0
    # Widest type first, so that every tensor is aligned to its own type in the file.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    for name in names:
        tensor, place = tensors[name], [position, position + tensors[name].nbytes]
        header[name] = {"dtype": _TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        position += tensor.nbytes
    begins = {name: {"saved_offsets": list(offsets.get(name, [0] * tensors[name].dim()))} for name in names}
    header["__metadata__"] = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(begins)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield _bytes_of(tensors[name])


def _bytes_of(tensor: Tensor) -> memoryview:
    """A view of a tensor's elements in row-major order, without a copy where they lie so on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel() <= 1:  # whose stride may be anything, which a view as bytes does not take
        flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    return flat.view(torch.uint8).numpy().data
