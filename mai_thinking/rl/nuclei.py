"""The nuclei of a response's tokens, compressed until they are replayed.

A nucleus of a trained model is mostly a handful of tokens, and its bits are V / 8 bytes: at a vocabulary of 200,019
twenty-five thousand, nearly all of them zero. What comes back out is bit for bit what went in.

Shapes: n tokens, B = ceil(V / 8) bytes of bits.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_ZSTD = pa.Codec("zstd", 1)  # Of eight ids it makes 29 bytes, of a wide nucleus less than its bits


def shrink(bits_nB: NDArray[np.uint8]) -> bytes:
    """From bits as `engine.nucleus.pack_bits` makes them."""
    return bytes(_ZSTD.compress(bits_nB.tobytes(), asbytes=True))


def bits_of(nuclei: Sequence[bytes], tokens: int) -> NDArray[np.uint8]:
    """[tokens, B]: the bits of all, one behind the other; of at least one token."""
    parts = [pa.CompressedInputStream(pa.py_buffer(part), "zstd").read() for part in nuclei]
    return np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(tokens, -1)


def set_bits(bits_nB: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and token of every set bit, in order; for nuclei of few tokens."""
    row, byte = np.nonzero(bits_nB)  # most bytes are 0
    place, bit = np.nonzero(np.unpackbits(bits_nB[row, byte][:, None], axis=1, bitorder="little"))
    return row[place], byte[place] * 8 + bit
