"""How every floor writes files, whole or not at all, and how it knows that they are still the same."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import xxhash


def checksum(file: Path, digest: Literal["sha256", "xxh3_128", "xxh3_64"] = "xxh3_128") -> str:
    """Hexadecimal checksum of a file's bytes. The xxh3 ones find accidents at the speed of memory; SHA-256 is for
    what names a file to others."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, digest if digest == "sha256" else getattr(xxhash, digest)).hexdigest()


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A path to write to; what was written takes `path`'s place when the block ends, or nothing changes.

    `durable`: it is on the disk, not only with the operating system, when the block ends; for a single writer, who
    overwrites what a kill left of an earlier try. Raises OSError.
    """
    temporary = _beside(path, "tmp" if durable else secrets.token_hex(4))
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666))  # the mode follows the umask
        mode = temporary.stat().st_mode & 0o666
        yield temporary
        temporary.chmod(mode)  # a library may have put a private file in its place
        if durable:
            synchronise(temporary)
        os.replace(temporary, path)
        if durable:
            synchronise(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill; it takes `path`'s place when the block ends, or nothing changes. Its files' modes follow
    the umask, as the folder's does, also where a library wrote them through private temporary ones."""
    temporary = _beside(path, secrets.token_hex(4))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(temporary.stat().st_mode & 0o666)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def synchronise(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, suffix: str) -> Path:
    """Hidden, so that no reader takes it for what it will be."""
    return path.with_name(f".{path.name}.{suffix}")
