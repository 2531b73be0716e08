"""Documents as vectors, from no model but what is counted here: hashed words and pairs of words."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from mai_thinking.data.words import Hashes, ngram_hashes


def hashed_features(texts: Iterable[Hashes], *, longest: int, bits: int) -> Any:
    """Of texts as hashed words: a sparse matrix [texts, 2^bits] float32, 1 + the logarithm of how often each run of up
    to `longest` words stands in a text. Words that share a column are told apart by the others. A character of a script
    without spaces is a word."""
    from scipy.sparse import csr_matrix  # half a second, and only for those who ask

    shift = np.uint64(64 - bits)
    columns, values, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)], [0]
    for words in texts:
        runs = np.concatenate([ngram_hashes(words, n) for n in range(1, longest + 1)]) >> shift
        column, count = np.unique(runs, return_counts=True)
        columns.append(column.astype(np.int32))
        values.append(1 + np.log(count, dtype=np.float32))
        sizes.append(len(column))
    shape = (len(sizes) - 1, 1 << bits)
    return csr_matrix((np.concatenate(values), np.concatenate(columns), np.cumsum(sizes)), shape=shape)
