"""The stages of cleaning, in order. MAI-Thinking-1 report §2.4.3. Each rule has the name of its config key."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial

import numpy as np

from mai_thinking.config.data import BoilerplateSection, CleaningSection, QualitySection
from mai_thinking.config.storage import atomic_file
from mai_thinking.data.accounting import Tally
from mai_thinking.data.boilerplate import without_boilerplate
from mai_thinking.data.documents import Documents
from mai_thinking.data.duplicates import Places, exact_duplicates, near_duplicates, templated
from mai_thinking.data.semantic import semantic_duplicates
from mai_thinking.data.words import WordHashes
from mai_thinking.data.work import Arrays, Parts, Work

Stage = Callable[[Documents], Documents]
"""From the documents to those that are left; what became of the others is counted."""


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
_FAULTS = ("min_bytes", "min_alphabetic", "max_line", "max_compression")


@dataclass(frozen=True)
class Cleaning:
    """The stages that are switched on, in order. What stands in two sources stays in the one that ranks higher in
    `drop_order`: so are the documents ordered.

    Procedural text is deduplicated by its exact text alone: exercises from one template are alike by design, and short
    or full of digits where they should be. In sources of code only comments can be boilerplate.
    """

    cleaning: CleaningSection
    tallies: Mapping[str, Tally]
    """Of all sources, in their order."""
    procedural: Set[int]
    code: Set[int]
    """The places of such ones in it."""
    work: Work

    def stages(self) -> dict[str, Stage]:
        """By the names of their keys, and `words`, which the later ones need."""
        cleaning, work = self.cleaning, self.work
        found: dict[str, Stage] = {}
        if (boilerplate := cleaning.boilerplate) is not None:
            found["boilerplate"] = partial(self._natural, partial(self._cut, boilerplate))
        if cleaning.exact_duplicates:
            found["exact_duplicates"] = partial(self._drop, "exact_duplicates", exact_duplicates)
        found["quality"] = partial(self._natural, self._keep_good)
        found["words"] = partial(with_words, work=work)
        finders: dict[str, Callable[[Documents], Places]] = {}
        if cleaning.near_duplicates is not None:
            finders["near_duplicates"] = partial(near_duplicates, cleaning=cleaning, work=work)
        if (templates := cleaning.templates) is not None:
            permutations = cleaning.minhash_permutations
            finders["templates"] = partial(templated, section=templates, permutations=permutations, work=work)
        if (semantic := cleaning.semantic) is not None:
            finders["semantic"] = partial(semantic_duplicates, section=semantic, work=work)
        return found | {name: partial(self._natural, partial(self._drop, name, finders[name])) for name in finders}

    def count_changes(self, rule: str, documents: Documents, parts: Parts) -> Documents:
        """What a stage that has `rewritten` the documents leaves of them."""
        new = Documents(documents.folder, parts.all("records")) if len(documents) else documents
        gone = parts.all("gone").astype(np.bool_)
        cut = np.where(gone, 0, documents.records["size"].astype(np.int64) - new.records["size"])
        for tally, mine in self._by_source(documents):
            tally.shorten(rule, int(cut[mine].sum()), int(np.count_nonzero(cut[mine])))
            tally.drop_documents(rule, documents[mine[gone[mine]]])
        return new[~gone]

    def _by_source(self, documents: Documents) -> Iterator[tuple[Tally, Places]]:
        """Each source's tally, and the places of its documents."""
        for source, tally in enumerate(self.tallies.values()):
            yield tally, np.flatnonzero(documents.records["source"] == source)

    def _natural(self, stage: Stage, documents: Documents) -> Documents:
        """Apply a stage to what is not procedural."""
        others = np.isin(documents.records["source"], list(self.procedural))
        records = np.concatenate([stage(documents[~others]).records, documents[others].records])
        return Documents(documents.folder, records[np.argsort(records["rank"], kind="stable")])

    def _drop(self, rule: str, finder: Callable[[Documents], Places], documents: Documents) -> Documents:
        twins = finder(documents)
        dropped = twins != np.arange(len(documents))
        for tally, mine in self._by_source(documents):
            gone = mine[dropped[mine]]
            tally.drop_documents(rule, documents[gone], documents[twins[gone]], list(self.tallies))
        return documents[~dropped]

    def _keep_good(self, documents: Documents) -> Documents:
        faults = self.work.each("quality", partial(_faults, self.cleaning.quality), documents).all("faults")
        for tally, mine in self._by_source(documents):
            for fault in dict.fromkeys(faults[mine[faults[mine] > 0]].tolist()):
                tally.drop_documents(_FAULTS[int(fault) - 1], documents[mine[faults[mine] == fault]])
        return documents[faults == 0]

    def _cut(self, section: BoilerplateSection, documents: Documents) -> Documents:
        parts = without_boilerplate(documents, self.code, section, self.work)
        return self.count_changes("boilerplate", documents, parts)


def _faults(quality: QualitySection, shard: int, documents: Documents) -> Arrays:
    """0 for a good one; 1 + the place of the rule that it breaks."""
    found = (quality_fault(text, quality) for text in documents.texts())
    return {"faults": np.array([0 if name is None else 1 + _FAULTS.index(name) for name in found], dtype=np.uint8)}


def with_words(documents: Documents, work: Work) -> Documents:
    """The same documents, the hashes of their words written down."""
    records = documents.records.copy()
    records["words"] = work.each("words", _write_words, documents).all("words")
    for shard in np.unique(records["shard"]):
        mine = records["shard"] == shard
        records["first_word"][mine] = np.cumsum(records["words"][mine], dtype=np.int64) - records["words"][mine]
    return Documents(documents.folder, records)


def _write_words(shard: int, documents: Documents) -> Arrays:
    words, counts = WordHashes(), list[int]()
    with atomic_file(documents.folder / f"{shard}.words") as temporary, temporary.open("wb") as file:
        for hashes in map(words.of, documents.texts()):
            file.write(hashes.tobytes())
            counts.append(len(hashes))
    return {"words": np.array(counts, dtype=np.uint32)}
