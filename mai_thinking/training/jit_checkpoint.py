"""Just-in-time checkpoints: when a rank has died, a replica that is left saves the run (Gupta et al., EuroSys 2024).

Nothing is computed twice then, and checkpoints on a schedule, which are there for the death of all ranks at once, can
be far apart. Between two updates every replica has the weights and the optimiser's state after the first of them, and
remembers what else all ranks have alike. What a rank has of its own, such as its generators, it writes to a file before
each update's last reduction: whoever gets through that knows that every rank has written. A dead rank's file stays.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mai_thinking.errors import RunError
from mai_thinking.training.checkpoint import Checkpointer, State
from mai_thinking.training.state import ModelState, OptimizerState, PerRank, read_tree, write_tree


class JitCheckpoint:
    """Keeps ready, from update to update, what it takes to save the state of all ranks from this one. For replicated
    models on several ranks. `state` is as for `Checkpointer.save`; `folder` is for the ranks' files. `announce(True)`
    is called when this rank could save, `announce(False)` at the end of the steps, however they ended: in between the
    launcher waits for it."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        optimizer: torch.optim.Optimizer,
        state: Callable[[], State],
        folder: Path,
        announce: Callable[[bool], None],
    ) -> None:
        self._checkpointer, self._state, self._folder, self._announce = checkpointer, state, folder, announce
        self._shared: tuple[int, dict[str, Any]] | None = None  # the last complete step, and what all ranks have alike
        self._updating = False
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "_updating", True))

    def before_reduction(self, step: int) -> None:
        """Write what this rank has of its own after `step`. Its weights are not yet updated; all the rest is."""
        self._folder.mkdir(exist_ok=True)
        own = {name: value.state.state_dict() for name, value in self._state().items() if isinstance(value, PerRank)}
        write_tree(self._file(self._checkpointer.rank, step), {"step": step, "own": own})

    def completed(self, step: int) -> None:
        """The update of `step` is done, and all that goes with it."""
        shared = {
            name: copy.deepcopy(value.state_dict() if hasattr(value, "state_dict") else value)
            for name, value in self._state().items()
            if not isinstance(value, PerRank) and not _is_live(value)
        }
        if self._shared is None:
            self._announce(True)
        self._shared, self._updating = (step, shared), False

    @contextlib.contextmanager
    def watching(self, saved: Callable[[int], None]) -> Iterator[None]:
        """Around the steps. An error inside, such as a peer's end in mid-reduction, goes on its way when the state is
        saved and `saved(step)` was called."""
        try:
            yield
        except RunError:  # the run itself is at fault, not a rank
            raise
        except RuntimeError:
            if self._shared is not None and not self._updating:
                self._save(*self._shared, saved)
            raise
        finally:
            if self._shared is not None:
                self._announce(False)

    def _save(self, step: int, shared: dict[str, Any], saved: Callable[[int], None]) -> None:
        live = {name: value for name, value in self._state().items() if _is_live(value)}
        try:
            own = [self._read(rank, step) for rank in range(self._checkpointer.world)]
            if self._checkpointer.save_jit(step, live | shared, own):
                saved(step)
        except Exception as problem:  # there is an older checkpoint, and the first error is the one to tell
            print(f"this rank could not save just in time: {problem}", file=sys.stderr, flush=True)

    def _read(self, rank: int, step: int) -> dict[str, Any]:
        """What `rank` had of its own after `step`."""
        written = read_tree(self._file(rank, step))
        if written["step"] != step:
            raise RuntimeError(f"rank {rank} left its state of step {written['step']}, not of {step}")
        return written["own"]

    def _file(self, rank: int, step: int) -> Path:
        """Two of each rank take turns: while one is written, the one before may be needed."""
        return self._folder / f"rank-{rank:05d}-{step % 2}.safetensors"


def _is_live(value: Any) -> bool:
    return isinstance(value, ModelState | OptimizerState)
