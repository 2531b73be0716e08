"""Checkpoints that cost a step little, are complete when visible, and are checked before they are believed.

Built on torch.distributed.checkpoint (DCP), which plans who writes what, and reads shards back at any number of ranks;
`checkpoint_storage` puts them on disk. MAI-Thinking-1 report §2.8: copied to host memory in the step, written and
committed beside the following steps, at most one in flight, the next as soon as that is done.
"""

import errno
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from mai_thinking.config.run import CheckpointSection
from mai_thinking.errors import UsageError
from mai_thinking.training.checkpoint_staging import HostCopies
from mai_thinking.training.checkpoint_storage import (
    CheckpointWriter,
    find_damage,
    read_manifest,
    remove_checkpoint,
    remove_leftovers,
    step_folder,
    visible_steps,
)
from mai_thinking.training.state import (
    TENSOR,
    ModelState,
    OptimizerState,
    PerRank,
    check_same_shape,
    join_tree,
    split_tree,
)

State = MutableMapping[str, Any]
"""name → `ModelState` or `OptimizerState`, which are read in place and may be sharded; or any object with
`state_dict()` and `load_state_dict(tree)`; or a `PerRank` around one; or a plain tree of tensors and JSON values. Every
rank passes the same names, and outside of `PerRank` the same values (of JSON values, rank 0's are saved)."""


class Checkpointer:
    """Saves and loads the whole state of a run under `folder` (`runs/NAME/checkpoints`).

    Constructing one is collective: where torch.distributed is initialised, every rank makes it at the same point of
    the program. Saving in the background talks over a gloo group of its own, so that it meets no gradient.
    `seal` is called on rank 0, in the background, with each checkpoint's complete folder before it is committed: for a
    record of where it comes from. `heartbeat` is called while a save holds up the run.
    """

    def __init__(
        self,
        folder: Path | str,
        section: CheckpointSection,
        seal: Callable[[Path], None] | None = None,
        heartbeat: Callable[[], None] = lambda: None,
    ):
        self.seal, self.heartbeat = seal, heartbeat
        self.folder = Path(folder)
        self.section = section
        distributed = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.loaded_world: int | None = None
        """The number of ranks that saved what `load_latest` loaded."""
        self.last_saved: int | None = None
        """The step of the newest checkpoint known to be committed."""
        self._damaged: set[int] = set()
        self._asked = False
        self._write: Future[None] | None = None
        self._writing = 0
        """The step of what `_write` writes."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._agreement = dist.new_group(backend="gloo") if self.world > 1 else None
        self._writers = dist.new_group(backend="gloo") if self.world > 1 else None
        self._host = HostCopies()
        # DCP warns at every save and load of a single process, which is an ordinary way to use this class.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    # ------------------------------------------------------------------------------------------------ saving

    def due(self, step: int) -> bool:
        """Whether to `save` after `step`. Ask after every step, on every rank: this is also where a failed write in
        the background raises, and where one that ended is noticed.

        A checkpoint that falls due while the one before is being written is not dropped: it is due at the first step
        after that is done.
        """
        self._asked = self._asked or step % self.section.every == 0
        if self._write is not None and self._agree_minimum(int(self._write.done())):
            self.wait()
        return self._asked and self._write is None

    def save(self, step: int, state: State, *, synchronous: bool = False) -> float:
        """Save `state` as the checkpoint of `step`; return the seconds for which this call held up the loop.

        Returns when the state is copied to host memory, or, if `synchronous` or the section says so, committed. Waits
        for one in flight first. Saving a step that is saved already does nothing. Collective.
        """
        begin = time.perf_counter()
        self.wait()
        self._asked = False
        if step != self.last_saved:
            tensors, document = self._collect(state)
            synchronous = synchronous or not self.section.asynchronous
            tensors = _own_share(tensors, self.rank, self.world)
            writer = CheckpointWriter(self.folder, step, self.rank, self.world, {self.rank: document}, self.seal)
            if synchronous:  # in the background it would hide that the steps hang
                writer.heartbeat = self.heartbeat
            if synchronous:
                _write(tensors, writer, self._writers)
                self._committed(step)
            else:
                self._writing = step
                self._write = self._thread.submit(_write, self._host.take(tensors), writer, self._writers)
        return time.perf_counter() - begin

    def save_jit(self, step: int, shared: State, own: Sequence[dict[str, Any]]) -> bool:
        """Save the checkpoint of `step` for all ranks, when the others can no longer be talked to; whether it was this
        rank that did it, and not another one before. `own`: for each rank, name → the tree of its own state."""
        if self._write is not None:
            wait([self._write], timeout=5)  # its other ranks are gone, which ends it: since then the disk is free
        tensors: dict[str, Tensor] = {}
        documents: dict[int, dict[str, Any]] = {rank: {"shared": {}, "own": {}} for rank in range(self.world)}
        for name, value in shared.items():
            documents[0]["shared"][name] = split_tree(_tree_of(value), name, tensors)
        for rank, trees in enumerate(own):
            for name, tree in trees.items():
                documents[rank]["own"][name] = split_tree(tree, f"rank-{rank}/{name}", tensors)
        writer = CheckpointWriter(self.folder, step, 0, self.world, documents, self.seal, jit=True)
        if writer.final.exists() or writer.temporary.exists():
            return False
        _write(tensors, writer, None)
        self.last_saved = step
        return True

    def wait(self) -> None:
        """Until no write is in flight. Raises what went wrong in it: OSError for a full disk, on every rank."""
        if self._write is None:
            return
        write, self._write = self._write, None
        write.result()
        self._committed(self._writing)

    def close(self) -> None:
        """Wait, and give the copies in host memory back."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._host.close()

    def _committed(self, step: int) -> None:
        self.last_saved = step
        self._damaged.discard(step)
        if self.rank == 0:
            self._retain()

    def _collect(self, state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors under unique names, and this rank's JSON document, which no later step can change."""
        tensors: dict[str, Tensor] = {}
        document: dict[str, dict[str, Any]] = {"shared": {}, "own": {}}
        for name, value in state.items():
            if isinstance(value, PerRank):
                prefix = f"rank-{self.rank}/{name}"
                document["own"][name] = split_tree(value.state.state_dict(), prefix, tensors)
            elif self.rank == 0:
                document["shared"][name] = split_tree(_tree_of(value), name, tensors)
            else:
                split_tree(_tree_of(value), name, tensors)
        return tensors, json.loads(json.dumps(document))

    def _retain(self) -> None:
        """Remove what is neither among the newest good ones nor to be kept for ever. Damaged ones stay for inspection
        until their step is saved again."""
        good = [step for step in visible_steps(self.folder) if step not in self._damaged]
        for step in good[: -self.section.keep]:
            if not (self.section.keep_every and step % self.section.keep_every == 0):
                remove_checkpoint(step_folder(self.folder, step))

    # ----------------------------------------------------------------------------------------------- loading

    def load_latest(self, state: State) -> int | None:
        """Load the newest good checkpoint into `state`; return its step, or None if there never was a checkpoint.

        Objects get `load_state_dict`, with new CPU tensors; plain trees are replaced in `state`. A newest checkpoint
        that is torn or damaged is reported and the one before is taken. UsageError if none is good: a run never starts
        over by itself. Collective.
        """
        if self.rank == 0:
            self._report([f"{name}: an unfinished save, removed" for name in remove_leftovers(self.folder)])
        steps = visible_steps(self.folder)
        for step in reversed(steps):
            path = step_folder(self.folder, step)
            damage = find_damage(path, self.rank, self.world)
            if self._agree_minimum(int(damage is None)):
                try:
                    self._load(path, state)
                except KeyError as error:  # the format of a part has changed since
                    raise UsageError(
                        f"{path}: was saved by another version, whose state lacks {error}; finish the run with that "
                        "version, or start from the run's weights in a new output_dir"
                    ) from None
                self.last_saved = step
                return step
            self._damaged.add(step)
            self._report([f"{path}: damaged ({damage or 'seen by another rank'}); going back to the one before"])
        if steps:
            raise UsageError(
                f"{self.folder}: none of its {len(steps)} checkpoints is whole; restore one from a copy, or name a new "
                "output_dir to start over"
            )
        return None

    def _load(self, path: Path, state: State) -> None:
        self.loaded_world = world = read_manifest(path)["world_size"]
        reader = CheckpointReader(path)
        for name, value in state.items():
            if isinstance(value, PerRank):
                self._load_own(name, value, reader, world)
            elif isinstance(value, ModelState | OptimizerState):
                value.load_state_dict(reader.read(name, like=value.state_dict()))
            elif hasattr(value, "load_state_dict"):
                value.load_state_dict(reader.read(name))
            else:
                state[name] = reader.read(name)

    def _load_own(self, name: str, value: PerRank, reader: "CheckpointReader", world: int) -> None:
        if world == self.world:
            value.state.load_state_dict(reader.read(name, of_rank=self.rank))
        elif hasattr(value.state, "load_from_world"):
            states = [reader.read(name, of_rank=rank) for rank in range(world)]
            value.state.load_from_world(states, self.rank, self.world)
        else:
            raise UsageError(
                f"{reader.path} was saved by {world} ranks and {name!r} needs as many; use --nproc {world}"
            )

    def _report(self, lines: list[str]) -> None:
        if self.rank == 0:
            for line in lines:
                print(f"checkpoint: {line}", file=sys.stderr, flush=True)

    def _agree_minimum(self, value: int) -> int:
        """The least of all ranks' values."""
        if self._agreement is None:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MIN, group=self._agreement)
        return int(shared)


class CheckpointReader:
    """Reads trees out of one checkpoint folder, in any process, distributed or not; checks no checksum."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._tensors = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        self._documents: dict[int, dict[str, Any]] = {}

    def read(self, name: str, *, like: Any = None, of_rank: int | None = None) -> Any:
        """The tree saved under `name`, or the one that `of_rank` saved as its own.

        Tensors are read into those at the same place of `like` (DTensors: this rank's shard of them); where `like` has
        none, into new ones on the CPU. UsageError if the name is not there or a shape or dtype differs.
        """
        part, rank, prefix = ("shared", 0, name) if of_rank is None else ("own", of_rank, f"rank-{of_rank}/{name}")
        try:
            skeleton = self._document(rank)[part][name]
        except KeyError:
            raise UsageError(f"{self.path} holds no {name!r}; it was saved by another kind of run") from None
        given: dict[str, Tensor] = {}
        split_tree(like, prefix, given)
        targets: dict[str, Tensor] = {}
        for key, saved in self._tensors.items():
            if key != prefix and not key.startswith(f"{prefix}/"):
                continue
            assert isinstance(saved, TensorStorageMetadata)
            if key in given:
                targets[key] = given[key]
                check_same_shape(key, saved.size, saved.properties.dtype, given[key])
            else:
                targets[key] = torch.empty(saved.size, dtype=saved.properties.dtype)
        if targets:
            self._load(targets)
        return join_tree(skeleton, targets)

    def read_tensors(self, name: str, keys: Iterable[str]) -> dict[str, Tensor]:
        """Those of the tree saved under `name` that stand under `keys`, on the CPU."""
        skeleton = self._document(0)["shared"][name]
        places = {key: skeleton[key][TENSOR] for key in keys}
        targets = {}
        for place in places.values():
            saved = self._tensors[place]
            assert isinstance(saved, TensorStorageMetadata)
            targets[place] = torch.empty(saved.size, dtype=saved.properties.dtype)
        self._load(targets)
        return {key: targets[place] for key, place in places.items()}

    def _load(self, targets: dict[str, Tensor]) -> None:
        """Every rank reads its own part; there is nothing to agree on."""
        storage = HuggingFaceStorageReader(str(self.path))
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        dcp.load(targets, storage_reader=storage, planner=planner, no_dist=True)

    def _document(self, rank: int) -> dict[str, Any]:
        if rank not in self._documents:
            self._documents[rank] = json.loads((self.path / f"rank-{rank:05d}.json").read_bytes())
        return self._documents[rank]


def _write(tensors: Any, writer: CheckpointWriter, group: dist.ProcessGroup | None) -> None:
    """Write and commit a checkpoint, in this thread or another. OSError for a full disk, on every rank; RuntimeError
    for what else goes wrong."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=writer.jit)
    except BaseException as problem:  # CheckpointException is no Exception
        if writer.rank == 0:
            shutil.rmtree(writer.temporary, ignore_errors=True)
        causes = problem.failures.values() if isinstance(problem, CheckpointException) else ()
        for cause, _ in causes:
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(cause.errno, cause.strerror, str(writer.final)) from None
        raise RuntimeError(f"the checkpoint of step {writer.step} could not be written") from problem


def _own_share(tensors: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What this rank copies and writes: its own tensors, its shards, and its part of those that all ranks hold alike.

    The largest goes to whoever has least so far. DCP would leave the others out too, but only after they were copied.
    """
    mine, bytes_of = {}, [0] * world
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if name.startswith("rank-") or isinstance(tensor, DTensor):
            mine[name] = tensor
            continue
        writer = bytes_of.index(min(bytes_of))
        bytes_of[writer] += tensor.nbytes
        if writer == rank:
            mine[name] = tensor
    return mine


def _tree_of(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value
