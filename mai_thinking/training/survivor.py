"""Saves the run alone when another rank has died: a replica that is left has all that a checkpoint has.

Nothing is computed twice then, and checkpoints on a schedule, which are there for the death of all ranks at once, can
be far apart. Known as just-in-time checkpointing (Gupta et al., EuroSys 2024).

What only the dead rank had, its random generators, its peers are told before each update; what all ranks have alike,
weights and optimiser state, changes at an update alone. So between two updates every rank has the whole state after the
first of them.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mai_thinking.errors import RunError
from mai_thinking.training.checkpoint import Checkpointer, State
from mai_thinking.training.state import ModelState, OptimizerState, PerRank


@dataclass(frozen=True)
class _Rest:
    """A state without what changes at updates."""

    step: int
    shared: dict[str, Any]
    own: list[dict[str, Any]]
    """Of each rank."""


class Survivor:
    """Keeps ready, from update to update, what it takes to save the state of all ranks from this one.

    For replicated models. Constructing one is collective where there are several ranks; with one it does nothing.
    `announce(True)` is called when this rank could save alone, `announce(False)` at the end of the steps, however they
    ended: in between the launcher waits for it.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        optimizer: torch.optim.Optimizer,
        state: Callable[[], State],
        announce: Callable[[bool], None],
    ) -> None:
        """`state` as for `Checkpointer.save`, with `progress`. When the optimiser is called, all of it but weights and
        optimiser state must be as it will be after the update."""
        self._checkpointer, self._state, self._announce = checkpointer, state, announce
        self._rest: _Rest | None = None
        self._next: _Rest | None = None  # during an update
        if checkpointer.world > 1:
            self._group = dist.new_group(backend="gloo")
            optimizer.register_step_pre_hook(lambda *_: self._before_update())
            optimizer.register_step_post_hook(lambda *_: self._after_update())

    @contextlib.contextmanager
    def watching(self, saved: Callable[[int], None]) -> Iterator[None]:
        """Around the steps. An error inside, such as a peer's end in mid-reduction, goes on its way when the state is
        saved and `saved(step)` was called."""
        try:
            yield
        except RunError:  # the run itself is at fault, not a rank
            raise
        except RuntimeError:
            if self._rest is not None and self._next is None:
                self._save(self._rest, saved)
            raise
        finally:
            if self._rest is not None:
                self._announce(False)

    def _save(self, rest: _Rest, saved: Callable[[int], None]) -> None:
        live = {name: value for name, value in self._state().items() if _is_live(value)}
        try:
            if self._checkpointer.save_jit(rest.step, live | rest.shared, rest.own):
                saved(rest.step)
        except Exception as problem:  # there is an older checkpoint, and the first error is the one to tell
            print(f"this rank could not save alone: {problem}", file=sys.stderr, flush=True)

    def _before_update(self) -> None:
        state = self._state()
        mine = {name: value.state.state_dict() for name, value in state.items() if isinstance(value, PerRank)}
        own: list[Any] = [None] * self._checkpointer.world
        dist.all_gather_object(own, mine, group=self._group)
        shared = {
            name: _copy(value)
            for name, value in state.items()
            if not isinstance(value, PerRank) and not _is_live(value)
        }
        self._next = _Rest(state["progress"]["step"], shared, own)

    def _after_update(self) -> None:
        if self._rest is None:
            self._announce(True)
        self._rest, self._next = self._next, None


def _is_live(value: Any) -> bool:
    return isinstance(value, ModelState | OptimizerState)


def _copy(value: Any) -> Any:
    return copy.deepcopy(value.state_dict() if hasattr(value, "state_dict") else value)
