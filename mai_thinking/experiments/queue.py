"""The work queue of a climb, a study or a ladder, for processes that share nothing but a folder."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout


class WorkQueue:
    """A job is whose lock it holds, `claims/NAME.lock`; the system takes back the lock of a process that died.

    A process has at most one job. What is to be done is for the caller to know: he looks, and takes, while no other
    process does (`planning`).
    """

    def __init__(self, folder: Path) -> None:
        self._claims = folder / "claims"
        self._claims.mkdir(parents=True, exist_ok=True)
        self._mine: tuple[str, FileLock] | None = None
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextmanager
    def planning(self) -> Iterator[None]:
        """One process at a time."""
        with FileLock(self._claims / ".plan.lock"):
            yield

    def take(self, names: Iterable[str]) -> str | None:
        """The first of the jobs that is nobody's, now this process's; None if all are others'. Within `planning`."""
        self.release()
        for name in names:
            claim = FileLock(self._claims / f"{name}.lock")
            try:
                claim.acquire(timeout=0)
            except Timeout:
                continue
            self._mine = name, claim
            return name
        return None

    def release(self) -> str:
        """Give back the job that was this process's; its name, or nothing."""
        if self._mine is None:
            return ""
        (name, claim), self._mine = self._mine, None
        claim.release()
        return name

    def log_once(self, text: str, key: str | None = None) -> None:
        """Print `text`, unless something with this `key` (by default the text) was printed before."""
        if (key := key or text) not in self._told:
            self._told.add(key)
            print(text, flush=True)
