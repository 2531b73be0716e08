"""The bytes of a checkpoint's files, which go past the page cache where they can."""

import errno
import fcntl
import os
import random
import tempfile
from pathlib import Path

import pytest
import xxhash

from mai_thinking.training import checkpoint_storage
from mai_thinking.training.checkpoint_storage import CheckpointWriter

LARGE = [random.Random(seed).randbytes(size) for seed, size in enumerate((5 * (1 << 20) + 3, 9 * (1 << 20)))]
BLOCKS = [b"a header", LARGE[0], b"", LARGE[1], b"."]
DIRECT = getattr(os, "O_DIRECT", 0)


def goes_past_cache(folder: Path) -> bool:
    """Whether the file system of `folder` has O_DIRECT."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_WRONLY | DIRECT))
        except OSError:
            return False
    return bool(DIRECT)


@pytest.fixture
def written(monkeypatch) -> list[tuple[int, bool]]:
    """Length of every write, and whether it went past the cache."""
    seen = []

    def write(descriptor: int, chunk: memoryview) -> int:
        seen.append((len(chunk), bool(DIRECT and fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)))
        return original(descriptor, chunk)

    original = os.write
    monkeypatch.setattr(os, "write", write)
    return seen


def write_blocks(folder: Path, *, jit: bool = False) -> None:
    writer = CheckpointWriter(folder, 1, jit=jit)
    writer.temporary.mkdir()
    entry = writer.write_file("file", BLOCKS)
    content = (writer.temporary / "file").read_bytes()
    assert content == b"".join(BLOCKS)
    assert entry == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def test_whole_chunks_go_past_the_page_cache_and_the_rest_through_it(tmp_path, written):
    direct = goes_past_cache(tmp_path)
    write_blocks(tmp_path)
    chunk = checkpoint_storage._CHUNK_BYTES
    assert written == [(chunk, direct), (sum(map(len, BLOCKS)) - chunk, False)]


def test_a_rank_that_can_save_jit_does_not_wait_for_the_disk(tmp_path, written, monkeypatch):
    synchronised = []
    monkeypatch.setattr(os, "fsync", synchronised.append)
    write_blocks(tmp_path, jit=True)
    assert not synchronised
    assert not any(direct for _, direct in written)


@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_file_system_that_refuses_is_written_in_the_ordinary_way(tmp_path, monkeypatch, refused):
    """An older kernel's tmpfs and some network file systems refuse at once; others only what does not suit them."""
    original, refusals = getattr(os, refused), []

    def refuse(first, *arguments):
        flags = arguments[0] if refused == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
        if flags & DIRECT:
            refusals.append(flags)
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(first, *arguments)

    expected = DIRECT and (refused == "open" or goes_past_cache(tmp_path))
    monkeypatch.setattr(os, refused, refuse)
    write_blocks(tmp_path)
    assert len(refusals) == (1 if expected else 0)


def test_a_failed_write_closes_the_file_and_says_what_failed(tmp_path, monkeypatch):
    closed = []
    original = os.close
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    monkeypatch.setattr(os, "close", lambda descriptor: (closed.append(descriptor), original(descriptor))[1])
    with pytest.raises(OSError, match="No space left"):
        write_blocks(tmp_path)
    assert len(closed) == 1
