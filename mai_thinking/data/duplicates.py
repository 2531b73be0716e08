"""Documents that repeat others: copies, near copies, pages of one template. MAI-Thinking-1 report §2.4.3, App. A.

A finder takes documents in the order of their rank, and says of each the place of the earlier one that it repeats, or
its own place. What is to be known of each by itself is found shard by shard; they are compared by these numbers alone.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from mai_thinking.config.data import CleaningSection, TemplatesSection
from mai_thinking.data.documents import Documents
from mai_thinking.data.words import Hashes, RunCounts, ngram_hashes
from mai_thinking.data.work import Arrays, Parts, Work

Places = NDArray[np.int64]
_MINHASH_SEED = 42
_MINHASH_RECALL = 0.95
_MINHASH_BATCH = 1024
_RUN = 3
"""Words that stand together in a frame: `the price of`."""
_FEWEST = 12
"""A page with fewer frequent runs is no evidence of a template."""


def exact_duplicates(documents: Documents) -> Places:
    """The same text but for white space."""
    _, first, group = np.unique(documents.records["fingerprint"], return_index=True, return_inverse=True)
    return first[group].astype(np.int64)


def near_duplicates(documents: Documents, cleaning: CleaningSection, work: Work) -> Places:
    """MinHash over runs of `minhash_shingle` words, in the order in which they stand."""
    assert cleaning.near_duplicates is not None
    rows = _band_rows(cleaning.near_duplicates, cleaning.minhash_permutations)
    task = partial(_shingle_signatures, cleaning.minhash_shingle, cleaning.minhash_permutations, rows)
    return _alike(work.each("near_duplicates", task, documents), cleaning.near_duplicates, work.folder)


def templated(documents: Documents, section: TemplatesSection, permutations: int, work: Work) -> Places:
    """MinHash over a page's frequent runs of `_RUN` words, in any order: what fills a template makes rare ones."""
    counts = RunCounts.expecting(documents.size // 6)
    runs = work.each("runs", partial(_runs, len(counts.table)), documents)
    table = work.once("run_counts.npy", partial(counts.save_sum, runs))
    task = partial(_frame_signatures, table, section, permutations, _band_rows(section.similarity, permutations))
    return _alike(work.each("templates", task, documents), section.similarity, work.folder)


# --------------------------------------------------------------------------------------------------- shard by shard


def _shingle_signatures(length: int, permutations: int, rows: int, shard: int, documents: Documents) -> Arrays:
    sets = (ngram_hashes(words, min(length, max(len(words), 1))) for words in documents.words())
    return _signatures(sets, permutations, rows)


def _runs(size: int, shard: int, documents: Documents) -> Arrays:
    return RunCounts.empty(size).in_documents(ngram_hashes(words, _RUN) for words in documents.words())


def _frame_signatures(
    table: Path, section: TemplatesSection, permutations: int, rows: int, shard: int, documents: Documents
) -> Arrays:
    counts = RunCounts(np.load(table, mmap_mode="r"))

    def frame(words: Hashes) -> Hashes:
        runs = np.unique(ngram_hashes(words, _RUN))
        frequent = runs[counts.of(runs) >= section.pages]
        return frequent if len(frequent) >= max(_FEWEST, section.frame * len(runs)) else frequent[:0]

    return _signatures(map(frame, documents.words()), permutations, rows)


def _signatures(sets: Iterator[Hashes], permutations: int, rows: int) -> Arrays:
    """MinHash signatures [sets, permutations], which sets [sets] are empty, and a hash [sets] of every `rows` numbers
    of a signature: chance collisions are candidates, no more."""
    parts, empty = [np.zeros((0, permutations), dtype=np.uint32)], list[bool]()
    while batch := list(islice(sets, _MINHASH_BATCH)):
        offsets = np.cumsum([0, *map(len, batch)])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(batch), offsets.tolist(), num_perm=permutations, seed=_MINHASH_SEED
        )
        parts.append(np.array(matrix.to_rows(), dtype=np.uint32))
        empty += [len(one) == 0 for one in batch]
    signatures = np.concatenate(parts)
    bands = ngram_hashes(signatures.ravel().astype(np.uint64), rows)[::rows].reshape(len(signatures), -1)
    by_number = {f"band {number}": band for number, band in enumerate(bands.T)}
    return {"signatures": signatures, "empty": np.array(empty, dtype=np.bool_), **by_number}


# ------------------------------------------------------------------------------------------------------ all together


def _alike(parts: Parts, threshold: float, folder: Path) -> Places:
    """For each set the place of the first earlier one, itself new, with an estimated Jaccard similarity of at least
    `threshold`; its own if there is none, or it is empty."""
    empty = parts.all("empty").astype(np.bool_)
    twins = np.arange(len(empty))
    owners, bands = _shared_bands(parts, np.flatnonzero(~empty))
    places, starts = np.unique(owners, return_index=True)
    having: defaultdict[int, list[int]] = defaultdict(list)
    """A band's content → the new ones that have it, by their rows of `signatures`."""
    with tempfile.TemporaryFile(dir=folder) as file:
        signatures = _chosen(parts, places, file)
        for row, mine in enumerate(np.split(bands, starts[1:]) if len(places) else ()):
            candidates = sorted({other for band in mine.tolist() for other in having[band]})
            same = np.flatnonzero((signatures[candidates] == signatures[row]).mean(axis=1) >= threshold)
            if len(same):
                twins[places[row]] = places[candidates[same[0]]]
            else:
                for band in mine.tolist():
                    having[band].append(row)
    return twins


def _shared_bands(parts: Parts, wanted: Places) -> tuple[Places, Places]:
    """Pairs (place, number of a band's content) of the `wanted` ones that share it with another, ordered by place."""
    owners, bands, before = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for name in (name for name in parts.names if name.startswith("band")):
        _, band, counts = np.unique(parts.all(name)[wanted], return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[band] > 1)
        owners.append(wanted[shared])
        bands.append(band[shared] + before)
        before += len(counts)
    order = np.argsort(np.concatenate(owners), kind="stable")
    return np.concatenate(owners)[order], np.concatenate(bands)[order]


def _chosen(parts: Parts, places: Places, file: IO[bytes]) -> NDArray[np.uint32]:
    """The signatures at these places, which are in order, in a file."""
    length = 0
    for signatures in parts.rows("signatures", places) if len(places) else ():
        file.write(signatures.tobytes())
        length = signatures.shape[1]
    file.flush()
    return np.memmap(file, np.uint32, "r", shape=(len(places), length)) if length else np.zeros((0, 1), np.uint32)


def _band_rows(threshold: float, permutations: int) -> int:
    """Rows per band: the most (so the fewest candidates) that still find 95 % of pairs at the threshold."""
    divisors = (rows for rows in range(1, permutations + 1) if permutations % rows == 0)
    found = {rows: 1 - (1 - threshold**rows) ** (permutations // rows) for rows in divisors}
    return max((rows for rows in found if found[rows] >= _MINHASH_RECALL), default=1)
