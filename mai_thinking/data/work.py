"""A preparation that can be killed: what it has finished lies in a folder, and is not done again.

A stage that looks at each document by itself is a task for every shard of 32 MB, done by as many processes
as there are cores, or by the machines of a Ray cluster; what a task finds is a file of arrays. A stage that compares
documents reads these files, and no text. The shards depend on the documents alone, so that any number of processes,
killed at any time, gives the same.
"""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mai_thinking.config.storage import atomic_file
from mai_thinking.data.cluster import Cluster
from mai_thinking.data.documents import Documents, close_files

Arrays = Mapping[str, NDArray[Any]]
Task = Callable[[int, Documents], Arrays]
"""From a shard's number and its documents to what is to be known of them. A function of a module, or a partial of one,
for other processes to find."""
_Call = tuple[int, Documents, Path]
"""A shard's number, its documents, and where what is found goes."""
_FEW = 3
"""So few shards are done before other processes have started."""


class Parts:
    """What a task found, shard by shard."""

    def __init__(self, paths: Mapping[int, Path]) -> None:
        """`paths`: shard → file."""
        self._paths = paths

    @property
    def names(self) -> list[str]:
        """Of the arrays."""
        for path in self._paths.values():
            with np.load(path) as file:
                return list(file.files)
        return []

    def of(self, shard: int) -> Arrays:
        """One shard's."""
        with np.load(self._paths[shard]) as file:
            return dict(file)

    def each(self, name: str) -> Iterator[NDArray[Any]]:
        """One array of each shard, in order."""
        for path in self._paths.values():
            with np.load(path) as file:
                yield file[name]

    def rows(self, name: str, places: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """Of one array of each shard the rows at these places of all, which are in order."""
        first = 0
        for rows in self.each(name):
            begin, end = np.searchsorted(places, [first, first + len(rows)])
            yield rows[places[begin:end] - first]
            first += len(rows)

    def all(self, name: str) -> NDArray[Any]:
        """One array of all shards."""
        found = list(self.each(name))
        return np.concatenate(found) if found else np.zeros(0)


class Work:
    """The folder of one preparation, and the processes or machines that it has, until it is left."""

    def __init__(self, folder: Path, ray: str | None = None, processes: int | None = None) -> None:
        """`ray`: the address of a cluster whose machines do it, and see the folder at the same path; without one as
        many processes as there are cores, unless their number is given."""
        self.folder = folder.absolute()
        self.texts = self.folder / "texts"
        here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._processes = processes or here
        self._parts = list[Path]()
        self._pool: ProcessPoolExecutor | None = None
        close_files()
        self.texts.mkdir(parents=True, exist_ok=True)
        for path in self.texts.iterdir():
            if path.suffix not in (".texts", ".words"):  # what a killed one left
                path.unlink(missing_ok=True)
        self._cluster = Cluster(ray) if ray is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:  # Ctrl-C should not wait for all that is queued
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._cluster is not None:
            self._cluster.close()

    def once(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file that `make` writes, unless it is there."""
        path = self.folder / name
        if not path.exists():
            with atomic_file(path) as temporary:
                make(temporary)
        return path

    def each(self, name: str, task: Task, documents: Documents) -> Parts:
        """What `task` finds in each shard of the documents, kept under `name`."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        self._parts.append(folder)
        shards = documents.shards()
        paths = {number: folder / f"{number}.npz" for number in shards}
        while missing := [(number, shards[number], path) for number, path in paths.items() if not path.exists()]:
            if self._cluster is not None:
                self._cluster.run(_do, task, missing)
            elif len(missing) <= _FEW or self._processes == 1:
                for call in missing:
                    _do(task, *call)
            else:
                self._in_processes(task, missing)
        return Parts(paths)

    def _in_processes(self, task: Task, calls: Sequence[_Call]) -> None:
        """A worker that is killed costs its shard, which is left out, unless nothing at all was done."""
        try:
            spawn = get_context("spawn")
            self._pool = self._pool or ProcessPoolExecutor(self._processes, spawn, _end_with_parent)
            for future in [self._pool.submit(_do, task, *call) for call in calls]:
                future.result()
        except BrokenProcessPool:
            self._pool = None
            if not any(path.exists() for _, _, path in calls):
                raise

    def forget_parts(self) -> None:
        """When a stage is done."""
        for folder in self._parts:
            shutil.rmtree(folder)
        self._parts.clear()


def _end_with_parent() -> None:
    """What a worker left behind wrote would come between a resumed preparation and its files."""

    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # or Ctrl-C would only end the shard, and the next one begin
    threading.Thread(target=wait, daemon=True).start()


def _do(task: Task, number: int, documents: Documents, path: Path) -> None:
    found = task(number, documents)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **found)
