"""Rows of traces, and of text between them: what a step of self-distillation learns from.

Traces lie in a row one behind the other, each with positions from 0, which keeps them apart in the model; loss falls on
responses only. What is left at a row's end is padding: no label, and left out of the routing's sums. A step's rows
depend on the seed, the selection and the step alone, so that any number of ranks sees the same.

Shapes: T places in a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mai_thinking.config.distillation import DistillConfig
from mai_thinking.data import Loader, PreparedData
from mai_thinking.data.packing import Mixture
from mai_thinking.errors import UsageError
from mai_thinking.rl.packing import lay_out
from mai_thinking.rl.rollout import Rollout
from mai_thinking.rl.trace_selection import Selection
from mai_thinking.training.learner import MicroBatch

IGNORED = -100  # The label of a place that nothing is learned from
TRACES, TEXT = "traces", "text"


@dataclass(frozen=True)
class TraceBatch:
    """A global batch: this rank's part of it, and counts of the whole."""

    micro_batches: list[MicroBatch]
    """Each with `input_ids`, `labels`, `position_ids` [rows, T] int64 and `token_mask` [rows, T] bool."""
    response_tokens: int
    text_rows: int


class TraceBatches:
    """An endless iterator over a run's batches, restorable at any step and any number of ranks.

    Sources are dealt trace by trace, each to the one that lags furthest behind its share; a source begins a new
    permutation of its traces when all have been dealt. `state_dict` is the same on every rank.
    """

    def __init__(
        self, selection: Selection, text: PreparedData | None, config: DistillConfig, *, rank: int, ranks: int
    ) -> None:
        """`text` is there if `config.text` is. UsageError if the ranks do not divide the batch."""
        batch = config.batch
        self.length, self.rows, self.rank, self.ranks = batch.context_length, batch.global_batch_size, rank, ranks
        batch.check_ranks(ranks)
        self.micro_batch = min(batch.micro_batch_size, self.rows // ranks)
        self.seed = config.seed
        self._identity = {"traces": selection.fingerprint, "seed": self.seed, "context_length": self.length}
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        self._sources = {str(number): source for number, source in enumerate(selection.sources)}
        self._dealt = Mixture({number: source.weight for number, source in self._sources.items()})
        share = config.text.share if config.text else 0.0
        self._kinds = Mixture({TRACES: 1 - share, TEXT: share} if share else {TRACES: 1.0})
        self._text: Loader | None = None
        if text is not None:
            self._text = Loader(
                text, context_length=self.length, micro_batch_size=1, rows_per_step=1, seed=config.seed, prefetch=0
            )

    def __next__(self) -> TraceBatch:
        kinds = [self._kinds.next_source()[0] for _ in range(self.rows)]
        layout = self._fill(kinds.count(TRACES))
        traces = iter(layout)
        share = self.rows // self.ranks
        mine = range(self.rank * share, (self.rank + 1) * share)
        made = []
        for place, kind in enumerate(kinds):
            # A row of text is read by every rank, which keeps its reader where the others' are.
            row = self._text_row() if kind == TEXT else next(traces)
            if place in mine:
                made.append(row if isinstance(row, dict) else trace_row(row, self.length))
        size = self.micro_batch
        parts = [made[begin : begin + size] for begin in range(0, share, size)]
        return TraceBatch(
            [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in parts],
            response_tokens=sum(len(example.own_ids) for row in layout for example in row),
            text_rows=kinds.count(TEXT),
        )

    @property
    def traces_dealt(self) -> int:
        """Since the run began."""
        return sum(self._dealt.rows.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: the position behind the last batch, and what it is a position in."""
        return {
            **self._identity,
            "dealt": dict(self._dealt.rows),
            "kinds": dict(self._kinds.rows),
            "text": None if self._text is None else self._text.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batch that `state` describes. UsageError if the traces are not those that it was of."""
        if any(state.get(name) != value for name, value in self._identity.items()):
            raise UsageError(
                "traces: the rules choose other traces now than when this run began, so their runs have gone on or "
                "changed; restore them, or start under another name"
            )
        self._dealt.rows.update(state["dealt"])
        self._kinds.rows.update(state["kinds"])
        if self._text is not None:
            self._text.load_state_dict(state["text"])

    def _fill(self, rows: int) -> list[list[Rollout]]:
        """The next traces, each in the first of so many rows that has room; the first that finds none is put back."""
        layout: list[list[Rollout]] = [[] for _ in range(rows)]
        room = [self.length] * rows
        while rows:
            name, number = self._dealt.next_source()
            example = self._example(name, number)
            row = next((row for row, free in enumerate(room) if free >= example.places), None)
            if row is None:
                self._dealt.rows[name] -= 1
                break
            layout[row].append(example)
            room[row] -= example.places
        return layout

    def _example(self, name: str, number: int) -> Rollout:
        source = self._sources[name]
        epoch, place = divmod(number, len(source.examples))
        if self._orders.get(name, (-1,))[0] != epoch:
            random = np.random.default_rng([self.seed, int(name), epoch])
            self._orders[name] = epoch, random.permutation(len(source.examples))
        return source.examples[self._orders[name][1][place]]

    def _text_row(self) -> dict[str, torch.Tensor]:
        assert self._text is not None
        row = {name: value[0] for name, value in next(self._text).micro_batches[0].items()}
        return row | {"token_mask": torch.ones(self.length, dtype=torch.bool)}


def trace_row(examples: Sequence[Rollout], length: int) -> dict[str, torch.Tensor]:
    """Rollouts one behind the other: `input_ids`, `labels`, `position_ids` [T] int64, `token_mask` [T] bool."""
    row = lay_out(examples, length)
    labels = np.full(length, IGNORED, dtype=np.int64)
    labels[row.pop("response_mask")] = np.concatenate([example.own_ids for example in examples])
    return {name: torch.from_numpy(array) for name, array in (row | {"labels": labels}).items()}
