"""Deduplication and quality filters. MAI-Thinking-1 report §2.3.

Every rule has the name of its config key, under which the documents and bytes that it dropped are counted.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from mai_thinking.config.data import CleaningSection, QualitySection
from mai_thinking.data.documents import Document
from mai_thinking.data.ngrams import WordHashes, ngram_hashes

_MINHASH_SEED = 42
_MINHASH_RECALL = 0.95
_MINHASH_BATCH = 1024


@dataclass
class Tally:
    """What became of a source's documents, as [documents, bytes]; `dropped` by rule, `shortened` with the bytes cut."""

    read: list[int] = field(default_factory=lambda: [0, 0])
    dropped: dict[str, list[int]] = field(default_factory=dict)
    shortened: list[int] = field(default_factory=lambda: [0, 0])
    kept: list[int] = field(default_factory=lambda: [0, 0])

    def drop(self, rule: str, size: int) -> None:
        """Count one document of `size` bytes under `rule`."""
        entry = self.dropped.setdefault(rule, [0, 0])
        entry[0] += 1
        entry[1] += size

    def cut(self, size: int) -> None:
        """Count one document that lost `size` bytes to decontamination."""
        self.shortened[0] += 1
        self.shortened[1] += size

    def worst_rule(self) -> str:
        """The rule that dropped most documents."""
        return max(self.dropped, key=lambda rule: self.dropped[rule][0], default="nothing")


def quality_fault(text: str, quality: QualitySection) -> str | None:
    """The name of the first rule that `text` breaks, or None. Non-ASCII bytes count as letters."""
    raw = text.encode()
    if len(raw) < quality.min_bytes:
        return "min_bytes"
    counts = np.bincount(np.frombuffer(raw, dtype=np.uint8), minlength=256)
    visible = int(counts.sum() - counts[_WHITE_SPACE].sum())
    if visible == 0 or counts[_LETTERS].sum() < quality.min_alphabetic * visible:
        return "min_alphabetic"
    if max(map(len, text.split("\n"))) > quality.max_line:
        return "max_line"
    if len(raw) > quality.max_compression * len(zlib.compress(raw, 1)):
        return "max_compression"
    return None


_LETTERS = np.array([chr(byte).isalpha() or byte >= 128 for byte in range(256)])
_WHITE_SPACE = np.array([chr(byte).isspace() and byte < 128 for byte in range(256)])


class ExactDuplicates:
    """Remembers the fingerprints of all documents that it has seen, in all sources."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def is_new(self, document: Document) -> bool:
        """False from the second time on."""
        fingerprint = document.fingerprint
        new = fingerprint not in self._seen
        self._seen.add(fingerprint)
        return new


class NearDuplicates:
    """MinHash over word shingles, with banding to find candidates (rensa makes the signatures)."""

    def __init__(self, cleaning: CleaningSection) -> None:
        if cleaning.near_duplicates is None:
            raise ValueError("near_duplicates is off")
        self.threshold = cleaning.near_duplicates
        self.permutations = cleaning.minhash_permutations
        self.shingle = cleaning.minhash_shingle
        self.rows = band_rows(self.threshold, self.permutations)
        self._words = WordHashes()
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(self.permutations // self.rows)]
        self._signatures: list[NDArray[np.uint32]] = []

    def are_new(self, documents: Sequence[Document]) -> list[bool]:
        """For each document, whether it resembles none that was kept before. The kept ones are remembered."""
        flags: list[bool] = []
        for start in range(0, len(documents), _MINHASH_BATCH):
            batch = [self._shingles(document.text) for document in documents[start : start + _MINHASH_BATCH]]
            flags += [len(s) == 0 or self._keep(row) for s, row in zip(batch, self._digest(batch), strict=True)]
        return flags

    def _shingles(self, text: str) -> NDArray[np.uint64]:
        words = self._words.of(text)
        return np.unique(ngram_hashes(words, min(self.shingle, max(len(words), 1))))

    def _digest(self, batch: list[NDArray[np.uint64]]) -> NDArray[np.uint32]:
        """Signatures [documents, permutations]."""
        offsets = np.cumsum([0, *(len(shingles) for shingles in batch)])
        flat = np.concatenate(batch)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            flat, offsets.tolist(), num_perm=self.permutations, seed=_MINHASH_SEED
        )
        return np.array(matrix.to_rows(), dtype=np.uint32)

    def _keep(self, signature: NDArray[np.uint32]) -> bool:
        keys = [signature[i : i + self.rows].tobytes() for i in range(0, self.permutations, self.rows)]
        candidates = {other for band, key in zip(self._bands, keys, strict=True) for other in band.get(key, ())}
        for other in candidates:
            if np.mean(self._signatures[other] == signature) >= self.threshold:
                return False
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        return True


def band_rows(threshold: float, permutations: int) -> int:
    """Rows per band: the most (so the fewest candidates) that still find 95 % of pairs at the threshold."""
    best = 1
    for rows in range(1, permutations + 1):
        found = 1 - (1 - threshold**rows) ** (permutations // rows)
        if permutations % rows == 0 and found >= _MINHASH_RECALL:
            best = rows
    return best


def clean(
    sources: Sequence[tuple[str, bool, list[Document]]], cleaning: CleaningSection, tallies: dict[str, Tally]
) -> dict[str, list[Document]]:
    """Apply all rules to `(name, procedural?, documents)`; the first source that has a text keeps it.

    Procedural text is deduplicated by its exact text alone: exercises from one template are alike by design, and short
    or full of digits where they should be.
    """
    exact = ExactDuplicates()
    near = NearDuplicates(cleaning) if cleaning.near_duplicates is not None else None
    kept: dict[str, list[Document]] = {}
    for name, procedural, documents in sources:
        tally = tallies[name]
        if cleaning.exact_duplicates:
            documents = _filtered(documents, map(exact.is_new, documents), "exact_duplicates", tally)
        if not procedural:
            documents = _without_faults(documents, cleaning.quality, tally)
            if near is not None:
                documents = _filtered(documents, near.are_new(documents), "near_duplicates", tally)
        kept[name] = documents
    return kept


def _filtered(documents: list[Document], flags: Iterable[bool], rule: str, tally: Tally) -> list[Document]:
    kept = []
    for document, flag in zip(documents, flags, strict=True):
        if flag:
            kept.append(document)
        else:
            tally.drop(rule, document.size)
    return kept


def _without_faults(documents: list[Document], quality: QualitySection, tally: Tally) -> list[Document]:
    kept = []
    for document in documents:
        rule = quality_fault(document.text, quality)
        if rule is None:
            kept.append(document)
        else:
            tally.drop(rule, document.size)
    return kept
