"""Deduplication and quality filters. MAI-Thinking-1 report §2.4. Each rule has the name of its config key."""

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from mai_thinking.config.data import CleaningSection, QualitySection
from mai_thinking.data.accounting import Tally
from mai_thinking.data.decontamination import WordHashes, ngram_hashes
from mai_thinking.data.documents import Document

_MINHASH_SEED = 42
_MINHASH_RECALL = 0.95
_MINHASH_BATCH = 1024


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


class NearDuplicates:
    """MinHash over word shingles, with banding to find candidates (rensa makes the signatures)."""

    def __init__(self, threshold: float, cleaning: CleaningSection) -> None:
        self.threshold = threshold
        self.permutations = cleaning.minhash_permutations
        self.shingle = cleaning.minhash_shingle
        self.rows = _band_rows(self.threshold, self.permutations)
        self._words = WordHashes()
        self._bands: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
        """Place and content of a band → the kept documents that have it."""
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
        keys = [(i, signature[i : i + self.rows].tobytes()) for i in range(0, self.permutations, self.rows)]
        candidates = {other for key in keys for other in self._bands.get(key, ())}
        if any(np.mean(self._signatures[other] == signature) >= self.threshold for other in candidates):
            return False
        for key in keys:
            self._bands[key].append(len(self._signatures))
        self._signatures.append(signature)
        return True


def _band_rows(threshold: float, permutations: int) -> int:
    """Rows per band: the most (so the fewest candidates) that still find 95 % of pairs at the threshold."""
    divisors = (rows for rows in range(1, permutations + 1) if permutations % rows == 0)
    found = {rows: 1 - (1 - threshold**rows) ** (permutations // rows) for rows in divisors}
    return max((rows for rows in found if found[rows] >= _MINHASH_RECALL), default=1)


def clean(
    sources: Mapping[str, list[Document]], procedural: Set[str], cleaning: CleaningSection, tallies: Mapping[str, Tally]
) -> dict[str, list[Document]]:
    """Apply all rules to each source's documents; the first source that has a text keeps it.

    Procedural text is deduplicated by its exact text alone: exercises from one template are alike by design, and short
    or full of digits where they should be.
    """
    seen: set[int] = set()
    near = NearDuplicates(cleaning.near_duplicates, cleaning) if cleaning.near_duplicates else None
    kept: dict[str, list[Document]] = {}
    for name, documents in sources.items():
        sift = tallies[name].sift
        if cleaning.exact_duplicates:
            documents = sift(documents, _repeats(documents, seen))
        if name not in procedural:
            documents = sift(documents, (quality_fault(d.text, cleaning.quality) for d in documents))
            if near is not None:
                documents = sift(documents, (None if new else "near_duplicates" for new in near.are_new(documents)))
        kept[name] = documents
    return kept


def _repeats(documents: Sequence[Document], seen: set[int]) -> Iterator[str | None]:
    """The rule's name for each document whose text was `seen` before, or in an earlier one."""
    for document in documents:
        fingerprint = document.fingerprint
        yield "exact_duplicates" if fingerprint in seen else None
        seen.add(fingerprint)
