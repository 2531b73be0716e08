"""The processes of a climb on this machine, by what they do: whom to strike in a test of faults."""

from collections.abc import Iterator
from pathlib import Path


def climb_processes(trainer: int) -> dict[str, list[int]]:
    """Process ids of the `worker`s and `grader`s of the trainer with this id. Linux."""
    running = list(_processes())

    def children(parents: list[int], word: str) -> list[int]:
        return sorted(pid for pid, parent, command in running if parent in parents and word in command)

    servers = children([trainer], "forkserver")
    workers = children(servers, "forkserver")
    return {"worker": workers, "grader": children([trainer, *workers], "grading_worker")}


def _processes() -> Iterator[tuple[int, int, str]]:
    """(id, parent's id, command) of all that run."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            yield int(path.name), parent, (path / "cmdline").read_bytes().decode(errors="replace")
        except (OSError, IndexError):
            continue
