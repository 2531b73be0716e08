"""Checkpoints that cost a step little, are complete when visible, and are checked before they are believed.

torch.distributed.checkpoint (DCP) reads shards back at any number of ranks; `checkpoint_storage` puts them on disk.
MAI-Thinking-1 report §2.8: copied to host memory in the step, written and committed beside the following steps, at most
one in flight, the next as soon as that is done.
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
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mai_thinking.config.run import CheckpointSection
from mai_thinking.errors import UsageError
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
    join_tree,
    split_tree,
)

# DCP warns at every load by a single process, which is an ordinary way to use it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

T = TypeVar("T")
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
        self.folder, self.section = Path(folder), section
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.loaded_world: int | None = None
        """The number of ranks that saved what `load_latest` loaded."""
        self.last_saved: int | None = None
        """The step of the newest checkpoint known to be committed."""
        self._damaged: set[int] = set()
        self._asked = False
        self._write: tuple[int, Future[None]] | None = None  # in flight: its step
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._agreement = dist.new_group(backend="gloo") if self.world > 1 else None
        self._writers = dist.new_group(backend="gloo") if self.world > 1 else None
        self._host = HostCopies()

    # ------------------------------------------------------------------------------------------------ saving

    def due(self, step: int) -> bool:
        """Whether to `save` after `step`. Ask after every step, on every rank: this is also where a failed write in the
        background raises, and where one that ended is noticed. A checkpoint that falls due while the one before is
        being written is not dropped: it is due at the first step after that is done."""
        self._asked = self._asked or step % self.section.every == 0
        if self._write is not None and self._agreed(self._write[1].done()):
            self.wait()
        return self._asked and self._write is None

    def save(self, step: int, state: State, *, synchronous: bool = False) -> float:
        """Save `state` as the checkpoint of `step`; return the seconds for which this call held up the loop. Returns
        when the state is copied to host memory, or, if `synchronous` or the section says so, committed. Waits for one
        in flight first. Saving a step that is saved already does nothing. Collective."""
        begin = time.perf_counter()
        self.wait()
        self._asked = False
        if step != self.last_saved:
            own = {name: value.state.state_dict() for name, value in state.items() if isinstance(value, PerRank)}
            tensors, documents = _take_apart(state, {self.rank: own})
            share, offsets = own_share(tensors, self.rank, self.world)
            writer = CheckpointWriter(self.folder, step, self.seal)
            if synchronous or not self.section.asynchronous:
                writer.heartbeat = self.heartbeat  # in the background it would hide that the steps hang
                self._commit(writer, self._writers, share, offsets, documents)
                self._committed(step)
            else:
                copies = self._host.take(share)
                write = self._thread.submit(self._commit, writer, self._writers, copies, offsets, documents)
                self._write = step, write
        return time.perf_counter() - begin

    def save_jit(self, step: int, shared: State, own: Sequence[dict[str, Any]]) -> bool:
        """Save the checkpoint of `step` for all ranks, when the others can no longer be talked to; whether it was this
        rank that did it, and not another one before. `own`: for each rank, name → the tree of its own state."""
        if self._write is not None:
            wait([self._write[1]], timeout=5)  # its other ranks are gone, which ends it: since then the disk is free
        tensors, documents = _take_apart(shared, dict(enumerate(own)))
        writer = CheckpointWriter(self.folder, step, self.seal, jit=True)
        if writer.final.exists() or writer.temporary.exists():
            return False
        self._commit(writer, None, tensors, {}, documents)
        self.last_saved = step
        return True

    def wait(self) -> None:
        """Until no write is in flight. Raises what went wrong in it: OSError for a full disk, on every rank."""
        if self._write is not None:
            (step, write), self._write = self._write, None
            write.result()
            self._committed(step)

    def close(self) -> None:
        """Wait, and give the copies in host memory back."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._host = HostCopies()

    def _commit(self, writer: CheckpointWriter, group: dist.ProcessGroup | None, *files: Any) -> None:
        """Write and commit a checkpoint, in this thread or another, with the ranks of `group` or alone. OSError for a
        full disk, on every rank; RuntimeError for what else goes wrong."""
        first = group is None or self.rank == 0
        try:
            written = _together(lambda: writer.write(self.rank, *files), group)
            whole = {name: entry for of_rank in written for name, entry in of_rank.items()}
            _together(lambda: writer.finish(whole, self.world) if first else None, group)
        except Exception as problem:
            if first:
                shutil.rmtree(writer.temporary, ignore_errors=True)
            if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(problem.errno, problem.strerror, str(writer.final)) from None
            raise RuntimeError(f"the checkpoint of step {writer.step} could not be written") from problem

    def _committed(self, step: int) -> None:
        """Remove what is neither among the newest good ones nor to be kept for ever. Damaged ones stay for inspection
        until their step is saved again."""
        self.last_saved = step
        self._damaged.discard(step)
        if self.rank == 0:
            good = [old for old in visible_steps(self.folder) if old not in self._damaged]
            for old in good[: -self.section.keep]:
                if not (self.section.keep_every and old % self.section.keep_every == 0):
                    remove_checkpoint(step_folder(self.folder, old))

    # ----------------------------------------------------------------------------------------------- loading

    def load_latest(self, state: State) -> int | None:
        """Load the newest good checkpoint into `state`; return its step, or None if there never was a checkpoint.
        Objects get `load_state_dict`, with new CPU tensors; plain trees are replaced in `state`. A newest checkpoint
        that is torn or damaged is reported and the one before is taken. UsageError if none is good: a run never starts
        over by itself. Collective."""
        if self.rank == 0:
            for name in remove_leftovers(self.folder):
                self._report(f"{name}: an unfinished save, removed")
        steps = visible_steps(self.folder)
        for step in reversed(steps):
            path = step_folder(self.folder, step)
            damage = find_damage(path, self.rank, self.world)
            if self._agreed(damage is None):
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
            self._report(f"{path}: damaged ({damage or 'seen by another rank'}); going back to the one before")
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
            if isinstance(value, PerRank) and world == self.world:
                value.state.load_state_dict(reader.read(name, of_rank=self.rank))
            elif isinstance(value, PerRank):
                if not hasattr(value.state, "load_from_world"):
                    raise UsageError(
                        f"{path} was saved by {world} ranks and {name!r} needs as many; use --nproc {world}"
                    )
                states = [reader.read(name, of_rank=rank) for rank in range(world)]
                value.state.load_from_world(states, self.rank, self.world)
            elif isinstance(value, ModelState | OptimizerState):
                value.load_state_dict(reader.read(name, like=value.state_dict()))
            elif hasattr(value, "load_state_dict"):
                value.load_state_dict(reader.read(name))
            else:
                state[name] = reader.read(name)

    def _report(self, line: str) -> None:
        if self.rank == 0:
            print(f"checkpoint: {line}", file=sys.stderr, flush=True)

    def _agreed(self, mine: bool) -> bool:
        """Whether it is so on all ranks."""
        if self._agreement is None:
            return mine
        all_ranks = torch.tensor(int(mine))
        dist.all_reduce(all_ranks, dist.ReduceOp.MIN, group=self._agreement)
        return bool(all_ranks)


class HostCopies:
    """Copies of tensors in host memory, in buffers that are used again from checkpoint to checkpoint: memory that was
    touched, and on a GPU's host pinned, before is several times faster to fill. PyTorch's own `DefaultStager` does the
    same, but that of torch 2.11 empties itself after its first use and fails at the second."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies by the same names, valid until the next call."""
        before, self._buffers = self._buffers, {}
        for name, tensor in tensors.items():
            buffer = before.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer.copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return dict(self._buffers)


class CheckpointReader:
    """Reads trees out of one checkpoint folder, in any process, distributed or not; checks no checksum."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._tensors = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        self._documents: dict[int, dict[str, Any]] = {}

    def read(self, name: str, *, like: Any = None, of_rank: int | None = None) -> Any:
        """The tree saved under `name`, or the one that `of_rank` saved as its own. Tensors are read into those at the
        same place of `like` (DTensors: this rank's shard of them); where `like` has none, into new ones on the CPU.
        UsageError if the name is not there or a shape or dtype differs."""
        part, rank, prefix = ("shared", 0, name) if of_rank is None else ("own", of_rank, f"rank-{of_rank}/{name}")
        try:
            skeleton = self._document(rank)[part][name]
        except KeyError:
            raise UsageError(f"{self.path} holds no {name!r}; it was saved by another kind of run") from None
        given: dict[str, Tensor] = {}
        split_tree(like, prefix, given)
        names = [key for key in self._tensors if key == prefix or key.startswith(f"{prefix}/")]
        return join_tree(skeleton, self._load(names, given))

    def read_tensors(self, name: str, keys: Iterable[str]) -> dict[str, Tensor]:
        """Those of the tree saved under `name` that stand under `keys`, on the CPU."""
        skeleton = {key: self._document(0)["shared"][name][key] for key in keys}
        return join_tree(skeleton, self._load([place[TENSOR] for place in skeleton.values()], {}))

    def _load(self, names: Iterable[str], given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every rank reads its own part; there is nothing to agree on."""
        targets = {}
        for name in names:
            saved = self._tensors[name]
            assert isinstance(saved, TensorStorageMetadata)
            shape, dtype = saved.size, saved.properties.dtype
            target = given[name] if name in given else torch.empty(shape, dtype=dtype)
            if (target.shape, target.dtype) != (shape, dtype):
                raise UsageError(
                    f"the checkpoint holds {name!r} as {_spell(shape, dtype)} where this run has "
                    f"{_spell(target.shape, target.dtype)}; rerun with the config that it was saved with"
                )
            targets[name] = target
        if targets:
            storage = HuggingFaceStorageReader(str(self.path))
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            dcp.load(targets, storage_reader=storage, planner=planner, no_dist=True)
        return targets

    def _document(self, rank: int) -> dict[str, Any]:
        if rank not in self._documents:
            self._documents[rank] = json.loads((self.path / f"rank-{rank:05d}.json").read_bytes())
        return self._documents[rank]


def _together(act: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What `act` returns on each rank of `group`, or here alone. What it raises on one rank, all raise."""
    mine: tuple[T | None, Exception | None]
    try:
        mine = act(), None
    except Exception as problem:
        mine = None, problem
    everyone: list[Any] = [mine]
    if group is not None:
        everyone *= dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
    for _, raised in everyone:
        if raised is not None:
            raise raised
    return [result for result, _ in everyone]


def own_share(tensors: dict[str, Tensor], rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Sequence[int]]]:
    """What this rank copies and writes: its own tensors, its shards, and its part of what several ranks hold alike, of
    which all take turns, from the largest on. And where its shards begin in the whole tensors."""
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith("rank-")}
    offsets: dict[str, Sequence[int]] = {}
    for turn, name in enumerate(sorted(tensors.keys() - mine, key=lambda name: (-tensors[name].nbytes, name))):
        tensor = tensors[name]
        if isinstance(tensor, DTensor):
            mesh, local = tensor.device_mesh, tensor.to_local()
            places = zip(mesh.get_coordinate() or (), mesh.shape, tensor.placements, strict=True)
            is_writer = all(at == turn % size for at, size, placement in places if placement.is_replicate())
            if is_writer and (local.numel() or not tensor.numel()):
                _, offsets[name] = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
                mine[name] = local
        elif turn % world == rank:
            mine[name] = tensor
    return mine, offsets


def _take_apart(state: State, own: dict[int, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[int, bytes]]:
    """All tensors under unique names, and of each rank in `own`, which has the trees of its own state, the JSON
    document, which no later step can change."""
    tensors: dict[str, Tensor] = {}
    shared = {
        name: split_tree(value.state_dict() if hasattr(value, "state_dict") else value, name, tensors)
        for name, value in state.items()
        if not isinstance(value, PerRank)
    }
    documents = {}
    for rank, trees in own.items():
        split = {name: split_tree(tree, f"rank-{rank}/{name}", tensors) for name, tree in trees.items()}
        document = {"shared": {} if rank else shared, "own": split}
        documents[rank] = json.dumps(document, separators=(",", ":")).encode()
    return tensors, documents


def _spell(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
