"""The stages of cleaning, in order. MAI-Thinking-1 report §2.4.3. Each rule has the name of its config key."""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from mai_thinking.config.data import BoilerplateSection, CleaningSection, QualitySection
from mai_thinking.data.accounting import Tally
from mai_thinking.data.boilerplate import without_boilerplate
from mai_thinking.data.documents import Document
from mai_thinking.data.duplicates import Places, exact_duplicates, near_duplicates, templated
from mai_thinking.data.semantic import semantic_duplicates

Finder = Callable[[Sequence[Document]], Places]
"""Says of each document the place of the earlier one that it repeats, or its own."""


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


_BY_SOURCE = dict[str, list[Document]]


class Clean(NamedTuple):
    """What `clean` gives."""

    documents: dict[str, list[Document]]
    seconds: dict[str, float]
    """By stage, in the order in which they ran."""


def clean(
    sources: Mapping[str, list[Document]],
    procedural: Set[str],
    code: Set[str],
    cleaning: CleaningSection,
    tallies: Mapping[str, Tally],
) -> Clean:
    """Apply the stages that are switched on to each source's documents. What stands in two sources stays in the one
    that ranks higher in `drop_order`.

    Procedural text is deduplicated by its exact text alone: exercises from one template are alike by design, and short
    or full of digits where they should be. `code` names the sources in which only comments can be boilerplate.
    """
    ranked = [*cleaning.drop_order, *(name for name in sources if name not in cleaning.drop_order)]
    kept = {name: sources[name] for name in ranked if name in sources}
    seconds: dict[str, float] = {}

    def run(rule: str, stage: Callable[[_BY_SOURCE], _BY_SOURCE], names: Set[str]) -> None:
        begin = time.perf_counter()
        kept.update(stage({name: found for name, found in kept.items() if name in names}))
        seconds[rule] = round(time.perf_counter() - begin, 2)

    everywhere, natural = set(kept), set(kept) - procedural
    if (boilerplate := cleaning.boilerplate) is not None:
        run("boilerplate", lambda found: _cut(found, code, boilerplate, tallies), natural)
    if cleaning.exact_duplicates:
        run("exact_duplicates", lambda found: _drop("exact_duplicates", exact_duplicates, found, tallies), everywhere)
    run("quality", lambda found: _keep_good(found, cleaning.quality, tallies), natural)
    for rule, finder in _finders(cleaning).items():
        run(rule, lambda found, rule=rule, finder=finder: _drop(rule, finder, found, tallies), natural)  # type: ignore
    return Clean({name: kept[name] for name in sources}, seconds)


def _finders(cleaning: CleaningSection) -> dict[str, Finder]:
    """The stages after the quality filters that drop what resembles an earlier document."""
    found: dict[str, Finder] = {}
    if cleaning.near_duplicates is not None:
        found["near_duplicates"] = lambda documents: near_duplicates(documents, cleaning)
    if (templates := cleaning.templates) is not None:
        found["templates"] = lambda documents: templated(documents, templates, cleaning.minhash_permutations)
    if (semantic := cleaning.semantic) is not None:
        found["semantic"] = lambda documents: semantic_duplicates(documents, semantic)
    return found


def _drop(
    rule: str, finder: Finder, sources: Mapping[str, list[Document]], tallies: Mapping[str, Tally]
) -> dict[str, list[Document]]:
    """What `finder` keeps, each source told whose documents its own repeat."""
    names = [name for name, documents in sources.items() for _ in documents]
    documents = [document for found in sources.values() for document in found]
    kept: dict[str, list[Document]] = {name: [] for name in sources}
    for place, twin in enumerate(finder(documents).tolist()):
        name, document = names[place], documents[place]
        if twin == place:
            kept[name].append(document)
        else:
            tallies[name].drop_document(rule, document, like=(names[twin], documents[twin]))
    return kept


def _keep_good(
    sources: Mapping[str, list[Document]], quality: QualitySection, tallies: Mapping[str, Tally]
) -> dict[str, list[Document]]:
    return {
        name: tallies[name].sift(documents, (quality_fault(document.text, quality) for document in documents))
        for name, documents in sources.items()
    }


def _cut(
    sources: Mapping[str, list[Document]], code: Set[str], section: BoilerplateSection, tallies: Mapping[str, Tally]
) -> dict[str, list[Document]]:
    """Documents without boilerplate; those of which nothing is left are dropped."""
    documents = [(name, document) for name, found in sources.items() for document in found]
    texts = without_boilerplate([d for _, d in documents], [name in code for name, _ in documents], section)
    kept: dict[str, list[Document]] = {name: [] for name in sources}
    for (name, document), text in zip(documents, texts, strict=True):
        if text is None:
            kept[name].append(document)
        elif text.strip():
            kept[name].append(document.with_text(text))
            tallies[name].shorten("boilerplate", document.size - kept[name][-1].size)
        else:
            tallies[name].drop_document("boilerplate", document)
    return kept
