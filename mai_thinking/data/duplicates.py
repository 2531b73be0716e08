"""Documents that repeat others: copies, near copies, pages of one template. MAI-Thinking-1 report §2.4.3, App. A.

A finder takes documents in the order of their rank, and says of each the place of the earlier one that it repeats, or
its own place. Each goes over the documents once or twice, and keeps numbers of them, no text.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from mai_thinking.config.data import CleaningSection, TemplatesSection
from mai_thinking.data.documents import Document
from mai_thinking.data.words import MULTIPLIER, SHIFT, Hashes, RunCounts, WordHashes, ngram_hashes

Places = NDArray[np.int64]
_MINHASH_SEED = 42
_MINHASH_RECALL = 0.95
_MINHASH_BATCH = 1024
_RUN = 3
"""Words that stand together in a frame: `the price of`."""
_FEWEST = 12
"""A page with fewer frequent runs is no evidence of a template."""


def exact_duplicates(documents: Sequence[Document]) -> Places:
    """The same text but for white space."""
    seen: dict[int, int] = {}
    places = (seen.setdefault(document.fingerprint, place) for place, document in enumerate(documents))
    return np.fromiter(places, dtype=np.int64, count=len(documents))


def near_duplicates(documents: Sequence[Document], cleaning: CleaningSection) -> Places:
    """MinHash over runs of `minhash_shingle` words, in the order in which they stand."""
    assert cleaning.near_duplicates is not None
    hashes = WordHashes()

    def shingles(text: str) -> Hashes:
        words = hashes.of(text)
        return np.unique(ngram_hashes(words, min(cleaning.minhash_shingle, max(len(words), 1))))

    sets = (shingles(document.text) for document in documents)
    return _alike(sets, cleaning.near_duplicates, cleaning.minhash_permutations)


def templated(documents: Sequence[Document], section: TemplatesSection, permutations: int) -> Places:
    """MinHash over a page's frequent runs of `_RUN` words, in any order: what fills a template makes rare ones."""
    words = WordHashes()
    counts = RunCounts(sum(document.size for document in documents) // 6)
    for document in documents:
        counts.add(np.unique(ngram_hashes(words.of(document.text), _RUN)))

    def frame(text: str) -> Hashes:
        runs = np.unique(ngram_hashes(words.of(text), _RUN))
        frequent = runs[counts.of(runs) >= section.pages]
        return frequent if len(frequent) >= max(_FEWEST, section.frame * len(runs)) else frequent[:0]

    return _alike((frame(document.text) for document in documents), section.similarity, permutations)


def _alike(sets: Iterable[Hashes], threshold: float, permutations: int) -> Places:
    """For each set the place of the first earlier one, itself new, with an estimated Jaccard similarity of at least
    `threshold`; its own if there is none, or it is empty."""
    signatures, empty = _signatures(sets, permutations)
    twins = np.arange(len(signatures))
    kept: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    """Band and content → the new ones that have it."""
    for place, keys in _shared_bands(signatures, _band_rows(threshold, permutations), ~empty):
        candidates = sorted({other for key in keys for other in kept[key]})
        same = (signatures[candidates] == signatures[place]).mean(axis=1) >= threshold if candidates else np.zeros(0)
        if same.any():
            twins[place] = candidates[int(same.argmax())]
        else:
            for key in keys:
                kept[key].append(place)
    return twins


def _signatures(sets: Iterable[Hashes], permutations: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """MinHash signatures [sets, permutations], and which sets [sets] are empty."""
    parts, empty = [np.zeros((0, permutations), dtype=np.uint32)], list[bool]()
    remaining = iter(sets)
    while batch := list(islice(remaining, _MINHASH_BATCH)):
        offsets = np.cumsum([0, *map(len, batch)])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(batch), offsets.tolist(), num_perm=permutations, seed=_MINHASH_SEED
        )
        parts.append(np.array(matrix.to_rows(), dtype=np.uint32))
        empty += [len(one) == 0 for one in batch]
    return np.concatenate(parts), np.array(empty, dtype=np.bool_)


def _shared_bands(
    signatures: NDArray[np.uint32], rows: int, wanted: NDArray[np.bool_]
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """In order, the places that share a band of `rows` numbers with another `wanted` one, and which bands these are."""
    places = np.flatnonzero(wanted)
    shared: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for start in range(0, signatures.shape[1], rows):
        band = np.zeros(len(places), dtype=np.uint64)
        for column in range(start, start + rows):  # chance collisions of 64 bits are candidates, no more
            band = (band ^ signatures[places, column]) * MULTIPLIER
            band ^= band >> SHIFT
        _, group, counts = np.unique(band, return_inverse=True, return_counts=True)
        for place, number in zip(places[counts[group] > 1].tolist(), group[counts[group] > 1].tolist(), strict=True):
            shared[place].append((start, number))
    yield from sorted(shared.items())


def _band_rows(threshold: float, permutations: int) -> int:
    """Rows per band: the most (so the fewest candidates) that still find 95 % of pairs at the threshold."""
    divisors = (rows for rows in range(1, permutations + 1) if permutations % rows == 0)
    found = {rows: 1 - (1 - threshold**rows) ** (permutations // rows) for rows in divisors}
    return max((rows for rows in found if found[rows] >= _MINHASH_RECALL), default=1)
