"""The nuclei of a response's tokens, kept until they are replayed: as ids where these are few, and as bits beyond.

A nucleus of a trained model is mostly a handful of tokens, and its bits are V / 8 bytes: at a vocabulary of 200,019
twenty-five thousand for what eight ids say. What comes back out is bit for bit what went in.

Shapes: n tokens, B = ceil(V / 8) bytes of bits, S ids in all, w tokens whose nuclei are wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

WIDE = -1
_PARTS = ("sizes", "ids", "bits")


@dataclass(frozen=True, eq=False)
class Nuclei:
    """Of n tokens, in order."""

    sizes: NDArray[np.int32]  # [n]: how many ids are a token's, or WIDE
    ids: NDArray[np.int32]  # [S], ascending within a nucleus
    bits: NDArray[np.uint8]  # [w, B], of those that are wide: their ids would take more room

    @classmethod
    def of(cls, bits_nB: NDArray[np.uint8]) -> "Nuclei":
        """From bits as `engine.nucleus.pack_bits` makes them."""
        counts = np.bitwise_count(bits_nB).sum(axis=1, dtype=np.int32)
        narrow = counts.astype(np.int64) * 4 <= bits_nB.shape[1]
        _, ids_S = set_bits(bits_nB[narrow])
        return cls(np.where(narrow, counts, np.int32(WIDE)), ids_S.astype(np.int32), bits_nB[~narrow])

    @classmethod
    def none(cls) -> "Nuclei":
        """Of no token."""
        return cls.of(np.empty((0, 0), dtype=np.uint8))

    def __eq__(self, other: object) -> bool:
        """The same sets leave the same arrays."""
        return isinstance(other, Nuclei) and all(np.array_equal(getattr(self, n), getattr(other, n)) for n in _PARTS)

    def __len__(self) -> int:
        return len(self.sizes)

    def unpacked(self) -> NDArray[np.uint8]:
        """[n, B]: all as bits."""
        bits_nB = np.zeros((len(self), self.bits.shape[1]), dtype=np.uint8)
        wide = self.sizes == WIDE
        bits_nB[wide] = self.bits
        row_S = np.repeat(np.arange(len(self)), np.where(wide, 0, self.sizes))
        np.bitwise_or.at(bits_nB, (row_S, self.ids // 8), (1 << self.ids % 8).astype(np.uint8))
        return bits_nB

    @classmethod
    def joined(cls, parts: Sequence["Nuclei"]) -> "Nuclei":
        """One after the other."""
        parts = [part for part in parts if len(part)] or list(parts[:1]) or [cls.none()]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in _PARTS))

    def split(self, lengths: Sequence[int]) -> list["Nuclei"]:
        """The inverse of `joined`."""
        ends = np.cumsum(lengths)[:-1]
        sizes = np.split(self.sizes, ends)
        wides = [int((part == WIDE).sum()) for part in sizes]
        narrow = [int(part[part != WIDE].sum()) for part in sizes]
        ids, bits = np.split(self.ids, np.cumsum(narrow)[:-1]), np.split(self.bits, np.cumsum(wides)[:-1])
        return [Nuclei(*parts) for parts in zip(sizes, ids, bits, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Tensors."""
        return {name: torch.from_numpy(getattr(self, name)) for name in _PARTS}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Nuclei":
        """From `state_dict()`."""
        return cls(*(state[name].numpy() for name in _PARTS))


def set_bits(bits_nB: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and token of every set bit, in order; for nuclei of few tokens."""
    row, byte = np.nonzero(bits_nB)  # most bytes are 0
    place, bit = np.nonzero(np.unpackbits(bits_nB[row, byte][:, None], axis=1, bitorder="little"))
    return row[place], byte[place] * 8 + bit
