"""Rows of tokens cut from an endless sequence of shuffled documents, and which source gives the next.

T: tokens in a row (`context_length`). A document is its end-of-text token followed by its text. A source's epochs,
each a new permutation of its documents, are laid end to end, and row k is the T + 1 tokens from k·T on: its inputs
are the first T, its labels the last T, and its last token is the first of row k + 1. So every token is an input once
and a label once, whatever T is, and no label is ever missing. The end-of-text token belongs to the document
that it opens: as an input it has position 0 there, and what it predicts is that document's first token.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from mai_thinking.data.prepared import PreparedSource
from mai_thinking.errors import UsageError

Tokens = NDArray[np.int64]


class Row(NamedTuple):
    """Tokens [T + 1], and the ids of the documents whose tokens are among the first T."""

    tokens: Tokens
    document_ids: list[str]


def positions(input_ids_T: Tokens, end_of_text: int) -> Tokens:
    """Positions [T] that start again from 0 at each document, and at the row's start."""
    index_T = np.arange(len(input_ids_T))
    starts_T = np.where(input_ids_T == end_of_text, index_T, 0)
    return index_T - np.maximum.accumulate(starts_T)


class Mixture:
    """Rows are dealt to the source that lags furthest behind its share: no dice, and never more than a row off.
    MAI-Thinking-1 report §2.4."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        self.shares = {name: weight / total for name, weight in weights.items()}
        self.rows = dict.fromkeys(weights, 0)

    def next_source(self) -> tuple[str, int]:
        """The source of the next row, and how many rows it had given before."""
        dealt = sum(self.rows.values()) + 1
        name = max(self.rows, key=lambda source: self.shares[source] * dealt - self.rows[source])
        index = self.rows[name]
        self.rows[name] += 1
        return name, index


class PreparedRows:
    """The rows of a prepared source; row k is a function of (seed, k) alone."""

    def __init__(self, name: str, source: PreparedSource, *, context_length: int, seed: int) -> None:
        if len(source.tokens) <= context_length:
            raise UsageError(
                f"source {name!r} has {len(source.tokens)} tokens, too few for a row of context_length "
                f"{context_length}; shorten context_length, add data, or remove the source"
            )
        self.name, self.context_length, self._source = name, context_length, source
        self._lengths = np.diff(source.offsets)
        self._seed = [seed, xxhash.xxh3_64_intdigest(name.encode())]
        self._epoch = functools.lru_cache(2)(self._permuted)  # a row can reach over into the next one

    def row(self, k: int) -> Row:
        """Row `k`, from 0."""
        pieces, ids = [], []
        start, missing = k * self.context_length, self.context_length + 1
        while missing:
            document, piece = self._piece(start, missing)
            pieces.append(piece)
            # The last token of the row is only a label: the next row has it as an input.
            if missing > 1:
                ids.append(f"{self.name}/{self._source.ids[document]}")
            start, missing = start + len(piece), missing - len(piece)
        return Row(np.concatenate(pieces).astype(np.int64), ids)

    def _piece(self, start: int, most: int) -> tuple[int, NDArray[np.unsignedinteger]]:
        """From token `start` of the endless sequence to the end of its document: the document and the tokens."""
        epoch, within = divmod(start, len(self._source.tokens))
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, within, side="right"))
        document = int(order[place])
        begin = within - int(ends[place] - self._lengths[document])
        first = int(self._source.offsets[document]) + begin
        last = min(first + most, int(self._source.offsets[document + 1]))
        return document, self._source.tokens[first:last]

    def _permuted(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permutation of an epoch and where, in tokens, each of its documents ends."""
        order = np.random.default_rng([*self._seed, epoch]).permutation(len(self._lengths))
        return order, np.cumsum(self._lengths[order])
