"""Documents that repeat others: copies, near copies, pages of one template. MAI-Thinking-1 report §2.4.3, App. A.

A finder takes documents in the order of their rank, and says of each the place of the earlier one that it repeats, or
its own place. What is to be known of each by itself is found shard by shard; they are compared by these numbers alone.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from mai_thinking.config.data import CleaningSection, TemplatesSection
from mai_thinking.data.documents import Documents
from mai_thinking.data.words import MULTIPLIER, SHIFT, Hashes, RunCounts, ngram_hashes
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

    def count(path: Path) -> None:
        counts = RunCounts.expecting(documents.size // 6)
        parts = work.each("runs", partial(_runs, len(counts.table)), documents)
        for slots, times in zip(parts.each("slots"), parts.each("times"), strict=True):
            counts.add(slots, times)
        with path.open("wb") as file:
            np.save(file, counts.table)

    table = work.once("run_counts.npy", count)
    task = partial(_frame_signatures, table, section, permutations, _band_rows(section.similarity, permutations))
    return _alike(work.each("templates", task, documents), section.similarity, work.folder)


# --------------------------------------------------------------------------------------------------- shard by shard


def _shingle_signatures(length: int, permutations: int, rows: int, shard: int, documents: Documents) -> Arrays:
    sets = (ngram_hashes(words, min(length, max(len(words), 1))) for words in documents.words())
    return _signatures(sets, permutations, rows)


def _runs(size: int, shard: int, documents: Documents) -> Arrays:
    """In how many documents of the shard each slot of a table of `size` has a run."""
    counts = RunCounts(np.zeros(size, dtype=np.uint8))
    runs = [np.unique(counts.slots(ngram_hashes(words, _RUN))).astype(np.uint32) for words in documents.words()]
    slots, times = np.unique(np.concatenate(runs), return_counts=True)
    return {"slots": slots, "times": np.minimum(times, 255).astype(np.uint8)}


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
    of a signature."""
    parts, empty = [np.zeros((0, permutations), dtype=np.uint32)], list[bool]()
    while batch := list(islice(sets, _MINHASH_BATCH)):
        offsets = np.cumsum([0, *map(len, batch)])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(batch), offsets.tolist(), num_perm=permutations, seed=_MINHASH_SEED
        )
        parts.append(np.array(matrix.to_rows(), dtype=np.uint32))
        empty += [len(one) == 0 for one in batch]
    signatures = np.concatenate(parts)
    bands = {}
    for start in range(0, permutations, rows):
        band = np.zeros(len(signatures), dtype=np.uint64)
        for column in range(start, start + rows):  # chance collisions of 64 bits are candidates, no more
            band = (band ^ signatures[:, column]) * MULTIPLIER
            band ^= band >> SHIFT
        bands[f"band {start}"] = band
    return {"signatures": signatures, "empty": np.array(empty, dtype=np.bool_), **bands}


# ------------------------------------------------------------------------------------------------------ all together


def _alike(parts: Parts, threshold: float, folder: Path) -> Places:
    """For each set the place of the first earlier one, itself new, with an estimated Jaccard similarity of at least
    `threshold`; its own if there is none, or it is empty."""
    wanted = np.flatnonzero(~parts.all("empty").astype(np.bool_))
    twins = np.arange(len(parts.all("empty")))
    owners, groups = _shared_bands(parts, wanted)
    places, starts = np.unique(owners, return_index=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        signatures = _chosen(parts, places, file)
        newest = np.full(int(groups.max(initial=-1)) + 1, -1)
        """Group → the last one in it that is new, by its row in `groups`; the one before that is in `before`."""
        before = np.full(len(groups), -1)
        row_of = np.repeat(np.arange(len(places)), np.diff([*starts, len(owners)]))
        for row, (begin, end) in enumerate(pairwise([*starts.tolist(), len(owners)])):
            found = set[int]()
            for at in newest[groups[begin:end]].tolist():
                while at >= 0:
                    found.add(int(row_of[at]))
                    at = before[at]
            candidates = sorted(found)
            same = (signatures[candidates] == signatures[row]).mean(axis=1) >= threshold if found else np.zeros(0)
            if same.any():
                twins[places[row]] = places[candidates[int(same.argmax())]]
            else:
                before[begin:end] = newest[groups[begin:end]]
                newest[groups[begin:end]] = np.arange(begin, end)
    return twins


def _shared_bands(parts: Parts, wanted: Places) -> tuple[Places, Places]:
    """Pairs (place, number of a band's content) of the `wanted` ones that share it with another, ordered by place."""
    owners, groups, before = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for name in (name for name in parts.names if name.startswith("band")):
        _, group, counts = np.unique(parts.all(name)[wanted], return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[group] > 1)
        owners.append(wanted[shared])
        groups.append(group[shared] + before)
        before += len(counts)
    order = np.argsort(np.concatenate(owners), kind="stable")
    return np.concatenate(owners)[order], np.concatenate(groups)[order]


def _chosen(parts: Parts, places: Places, file: object) -> NDArray[np.uint32]:
    """The signatures at these places, in a file."""
    first, signatures, filled = 0, np.zeros((0, 1), dtype=np.uint32), 0
    for these in parts.each("signatures") if len(places) else ():
        if not filled:
            signatures = np.memmap(file, np.uint32, "w+", shape=(len(places), these.shape[1]))  # type: ignore
        mine = these[places[(places >= first) & (places < first + len(these))] - first]
        signatures[filled : filled + len(mine)] = mine
        first, filled = first + len(these), filled + len(mine)
    return signatures


def _band_rows(threshold: float, permutations: int) -> int:
    """Rows per band: the most (so the fewest candidates) that still find 95 % of pairs at the threshold."""
    divisors = (rows for rows in range(1, permutations + 1) if permutations % rows == 0)
    found = {rows: 1 - (1 - threshold**rows) ** (permutations // rows) for rows in divisors}
    return max((rows for rows in found if found[rows] >= _MINHASH_RECALL), default=1)
