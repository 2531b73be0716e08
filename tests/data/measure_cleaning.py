"""What each stage of cleaning finds of the faults of `planted`, and what it takes that is clean:
`PYTHONPATH=. python tests/data/measure_cleaning.py [OUT]` writes OUT/summary.md and .json (default: results/corpus).

Through `prepare` alone: what is dropped are the documents that are not there; what is cut are the lines that are not.
"""

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from planted import LANGUAGES, Planted, dirty_corpus

from mai_thinking.config.data import DataSection
from mai_thinking.data import PreparedData, prepare

OFF: dict[str, Any] = {"exact_duplicates": False, "near_duplicates": None, "decontamination_ngram": None}
STAGES: dict[str, dict[str, Any]] = {
    "exact and MinHash .7": {"exact_duplicates": True, "near_duplicates": 0.7},
    "MinHash .8": {"near_duplicates": 0.8},
    "13 words": {"decontamination_ngram": 13},
    "boilerplate": {"boilerplate": {}},
    "templates": {"templates": {}},
    "semantic": {"semantic": {}},
    "fuzzy": {"fuzzy_decontamination": {}},
    "all": {
        "exact_duplicates": True,
        "near_duplicates": 0.7,
        "decontamination_ngram": 13,
        "boilerplate": {},
        "templates": {},
        "semantic": {},
        "fuzzy_decontamination": {},
    },
}


class Outcome(NamedTuple):
    """What became of a document."""

    document: Planted
    text: str | None
    """None if it was dropped."""

    @property
    def found(self) -> bool:
        """Whether the fault is gone."""
        if self.document.repeats or self.text is None:
            return self.text is None
        left = _plain(self.text)
        if self.document.kind == "boilerplate within":  # one may stay
            return left.count(_plain(self.document.lines[0])) <= 1
        return not any(_plain(line) in left for line in self.document.lines)

    @property
    def harmed(self) -> bool:
        """Whether a document was dropped that is no copy, or a tenth of it cut that was not planted."""
        if self.document.repeats:
            return False
        planted = sum(len(_plain(line)) for line in self.document.lines)
        planted *= 10 if self.document.kind == "boilerplate within" else 1
        return self.text is None or len(_plain(self.text)) < 0.9 * (len(_plain(self.document.text)) - planted)


def _plain(text: str) -> str:
    return re.sub(r"\W", "", text).casefold()


def outcomes(cleaning: dict[str, Any], folder: Path, languages: Sequence[str] = LANGUAGES) -> list[Outcome]:
    """Every planted document after preparation with this `cleaning`."""
    found: list[Outcome] = []
    sources, planted, benchmark = [], {}, []
    for language in languages:
        planted[language], questions = dirty_corpus(language)
        benchmark += questions
        path = folder / f"{language}.jsonl"
        path.write_text("".join(json.dumps({"text": one.text}) + "\n" for one in planted[language]), encoding="utf-8")
        sources.append({
            "name": language, "kind": "jsonl", "path": str(path), "licence": "mixed", "provenance": "human",
            "weight": 1, "category": "code" if language == "code" else "general", "held_out": False,
        })  # fmt: skip
    (folder / "benchmark.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in benchmark))
    quality = {"min_bytes": 1, "max_line": 10**6, "min_alphabetic": 0, "max_compression": 1000}
    section = {"quality": quality, "benchmarks": [str(folder / "benchmark.jsonl")], **OFF, **cleaning}
    tree = {"sources": sources, "cleaning": section, "tokenizer": {"vocab_size": 500, "training_bytes": 200_000}}
    data = prepare(DataSection.model_validate(tree | {"cache_dir": str(folder / "cache")}))
    for language in languages:
        texts = _texts(data, language)
        for line, one in enumerate(planted[language], 1):
            found.append(Outcome(one, texts.get(line)))
    return found


def _texts(data: PreparedData, name: str) -> dict[int, str]:
    """Line of the file → what is left of its text."""
    source = data.sources[name]
    lines = [int(id.rpartition(":")[2]) for id in source.ids]
    spans = [source.tokens[a + 1 : b].tolist() for a, b in pairwise(source.offsets)]
    return dict(zip(lines, map(data.tokenizer.decode, spans), strict=True))


def recall(found: list[Outcome]) -> dict[str, dict[str, float]]:
    """Kind → language → share found, and all languages together."""
    table: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(one.document.kind for one in found if one.document.kind != "clean"):
        for language in (*LANGUAGES, "all"):
            if those := [
                o.found for o in found if o.document.kind == kind and language in (o.document.language, "all")
            ]:
                table.setdefault(kind, {})[language] = sum(those) / len(those)
    return table


def harmed(found: list[Outcome]) -> dict[str, float]:
    """Language → share harmed of the documents that are to be kept."""
    kept = [o for o in found if not o.document.repeats]
    return {
        language: sum(o.harmed for o in those) / len(those)
        for language in (*LANGUAGES, "all")
        if (those := [o for o in kept if language in (o.document.language, "all")])
    }


def precision(found: list[Outcome]) -> float | None:
    """Of the documents that were dropped, or cut by a tenth, the share that had a fault of any kind."""
    touched = [o for o in found if o.text is None or o.harmed or (o.document.lines and o.found)]
    return sum(not o.harmed for o in touched) / len(touched) if touched else None


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for stage, cleaning in STAGES.items():
            if len(sys.argv) > 1 and sys.argv[1] not in stage:
                continue
            result = outcomes(cleaning, Path(name))
            print("==", stage, "precision", precision(result), "harmed", harmed(result))
            for kind, row in recall(result).items():
                print(f"{kind:28}", {k: round(v, 2) for k, v in row.items()})
            for one in [o for o in result if o.harmed][:20]:
                print("   harmed:", one.document.kind, one.document.language, repr(one.document.text[:150]))
