"""What each stage of cleaning finds of the faults of `planted`, and what it takes that is clean:
`PYTHONPATH=. python tests/data/measure_cleaning.py OUT` writes OUT/summary.md and .json; `… OUT 30 100` adds the speed
and memory of 30 and of 100 MB, `… OUT killed:1000` whether killed preparations give the same, `… OUT datatrove:10` the
speed of datatrove's MinHash beside ours, `… OUT tokens:20` that of formats of tokens, `… OUT gains:RUNS` what cleaning
is worth, by small runs below the folder RUNS, `… OUT context:RUN` what a longer prefix is worth to a run's model.

Through `prepare` alone: what is dropped are the documents that are not there; what is cut are the lines that are not.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from planted import LANGUAGES, Planted, dirty_corpus

from mai_thinking.bench.machine import describe
from mai_thinking.config.data import DataSection
from mai_thinking.config.table import Cell, Table
from mai_thinking.data import PreparedData, prepare
from mai_thinking.report.document import Document
from mai_thinking.report.figures import Figure, Panel, Series

OFF: dict[str, Any] = {"exact_duplicates": False, "near_duplicates": None, "decontamination_ngram": None}
SEED = 1
"""Of the faults that are measured; the stages' thresholds were chosen on those of seed 0."""
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


def outcomes(
    cleaning: dict[str, Any], folder: Path, languages: Sequence[str] = LANGUAGES, seed: int = 0
) -> list[Outcome]:
    """Every planted document after preparation with this `cleaning`."""
    found: list[Outcome] = []
    sources, planted, benchmark = [], {}, []
    for language in languages:
        planted[language], questions = dirty_corpus(language, seed)
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


def measure_faults() -> dict[str, Any]:
    """Every set of stages on the planted corpus."""
    stages, examples = {}, []
    for stage, cleaning in STAGES.items():
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as name:
            found = outcomes(cleaning, Path(name), seed=SEED)
        stages[stage] = {"recall": recall(found), "precision": precision(found), "harmed": harmed(found)}
        examples += [[stage, o.document.language, o.document.kind, o.document.text[:120]] for o in found if o.harmed][
            :4
        ]
        print(f"{stage}: {time.process_time() - begin:.0f} s", flush=True)
    return {"stages": stages, "examples": examples, "documents": len(found)}


def draw(out: Path) -> None:
    """The page, from the parts that are there."""
    parts = {path.stem.removeprefix("part-"): json.loads(path.read_text()) for path in sorted(out.glob("part-*.json"))}
    faults = parts["faults"]
    stages = faults["found"]["stages"]
    page = Document("Corpus: what cleaning finds")
    page.facts["made"] = {name: part["made"] for name, part in parts.items()}
    page.add(
        f"{faults['found']['documents']:,} documents in English, code, Chinese and Arabic, "
        f"{len(stages['all']['recall'])} kinds of faults planted by rule. Each column is one set of stages "
        "alone; the first three are what there was before. A copy counts as found when it is dropped, a line when it "
        "is gone. The thresholds were chosen on other faults of the same kinds."
    )
    kinds = list(stages["all"]["recall"])
    rows: list[list[Cell]] = [[kind, *(stages[s]["recall"][kind]["all"] for s in stages)] for kind in kinds]
    page.add_table("recall_table", Table(["fault", *stages], rows, digits=2), "Recall")
    page.facts["recall"] = {stage: one["recall"] for stage, one in stages.items()}
    page.facts["precision"] = {stage: one["precision"] for stage, one in stages.items()}
    page.facts["harmed"] = {stage: one["harmed"] for stage, one in stages.items()}
    rows = [[s, one["precision"], *(100 * one["harmed"][name] for name in (*LANGUAGES, "all"))]
            for s, one in stages.items()]  # fmt: skip
    columns = ["stages", "precision", *(f"{name}, %" for name in (*LANGUAGES, "all"))]
    page.add_table(
        "clean", Table(columns, rows, digits=2), "Harm: documents dropped, or cut by a tenth, that had no fault"
    )
    rows = [[kind, *(stages["all"]["recall"][kind][name] for name in LANGUAGES)] for kind in kinds]
    page.add_table("by_language", Table(["all stages", *LANGUAGES], rows, digits=2), "Recall by language")
    page.add_table("harm_examples", Table(["stages", "language", "kind", "how it begins"], faults["found"]["examples"]))
    speeds = {name: part["found"] for name, part in parts.items() if name.startswith("speed")}
    if speeds:
        names = list(next(iter(speeds.values()))["mb_per_s"])
        rows = [[name, *(one["mb_per_s"].get(name) for one in speeds.values())] for name in names]
        rows += [["peak memory of all processes, GB", *(one["peak_gb"] for one in speeds.values())]]
        rows += [["of its largest process, GB", *(one.get("largest_gb", one["peak_gb"]) for one in speeds.values())]]
        rows += [["before anything was read, GB", *(one["gb_before"] for one in speeds.values())]]
        rows += [["documents", *(one["documents"] for one in speeds.values())]]
        sizes = [f"{one['mb']:.0f} MB" + ", two workers" * (one.get("processes", 1) > 1) for one in speeds.values()]
        columns = ["MB a second of one core", *sizes]
        page.add_table("speed", Table(columns, rows, digits=2), "Speed and memory, every stage on")
        page.facts["mb_per_s"] = {name: one["mb_per_s"] for name, one in speeds.items()}
        page.facts["peak_gb"] = {name: one["peak_gb"] for name, one in speeds.items()}
        stages = {
            name: [one["stage_gb"].get(name) for one in speeds.values()] for name in speeds[max(speeds)]["stage_gb"]
        }
        columns = ["peak memory, GB, in", *columns[1:]]
        page.add_table("stage_gb", Table(columns, [[name, *row] for name, row in stages.items()], digits=2))
    for size, part in (
        (name.partition("-")[2], part["found"]) for name, part in parts.items() if name.startswith("killed")
    ):
        unhurt = speeds[f"speed-{size}"]
        whole, others = unhurt["files"], unhurt.get("processes", 1)
        other = sorted(name for name in whole | part["files"] if whole.get(name) != part["files"].get(name))
        page.facts.setdefault("killed", {})[size] = {
            "mb": part["mb"], "in": part["killed_in"], "files": len(whole), "other_files": other,
        }  # fmt: skip
        page.add(
            f"{part['mb']:,.0f} MB, in {part['processes']} processes, killed {len(part['killed_in'])} times (behind "
            f"{', '.join(part['killed_in'])}): of {len(whole)} files, {len(other)} differ from what "
            f"{'one process' if others == 1 else f'{others} processes'} made that nobody killed."
        )
    rows = [
        [f"{engine}, {found['mb']:.0f} MB", found[engine]["kept"], found[engine]["mb_per_s"]]
        for found in (part["found"] for name, part in parts.items() if name.startswith("datatrove"))
        for engine in ("ours", "datatrove")
    ]
    if rows:
        page.add_table("minhash", Table(["MinHash .8", "documents kept", "MB a second of one core"], rows, digits=2))
    for part in (part["found"] for name, part in parts.items() if name.startswith("tokens")):
        kinds = [kind for kind in ("flat", "parquet", "mds") if part[kind]]
        columns = ["rows_per_s", "mb", "grew_mb"]
        rows = [[kind, *(part[kind][name] for name in columns)] for kind in kinds]
        names = ["format", "rows of 2,048 a second", "MB on disk", "memory that 2,000 rows took, MB"]
        page.add_table("tokens", Table(names, rows, digits=1), f"Rows at random from {part['mb']:.0f} MB of tokens")
    if "gains" in parts:
        _draw_gains(page, parts["gains"]["found"])
    for part in (part["found"] for name, part in parts.items() if name == "context"):
        _draw_context(page, part)
    lines = [f"- *{name}*: `{part['made']['command']}`; code {part['made']['commit'][:7]}; {part['made']['cpu']}"
             for name, part in parts.items()]  # fmt: skip
    page.add("\n".join(lines), heading="How it was made")
    page.write(out)


def _draw_gains(page: Document, found: dict[str, Any]) -> None:
    columns = ["eq3", "gain", "low", "high", "seeds", "read_mb", "trained_mb"]
    rows: list[list[Cell]] = [[arm, *(one[name] for name in columns)] for arm, one in found["gains"].items()]
    names = ["cleaned", "Eq. 3", "gain, %", "from", "to", "seeds", "MB read", "MB left"]
    page.add_table("gains_table", Table(names, rows, digits=2), "Does it pay?")
    page.facts["gains"] = found["gains"]
    page.facts["waiting"] = found["waiting"]
    page.add(
        f"Models of {found['parameters']:,} parameters, {found['tokens']:,} tokens each, of manuals, docstrings and "
        "the standard library that were dirtied by rule (furniture around every page, copies, templates), or as they "
        "are where an arm says so. Eq. 3 is of text that was set apart before, normalised by the first run without "
        "cleaning. The gain is over the same text without cleaning, seed by seed; the interval is Student's 95 %. "
        f"The loader's share of waiting in these runs: {100 * found['waiting']:.2f} %."
    )


def _draw_context(page: Document, found: dict[str, Any]) -> None:
    prefixes, trained = found["prefixes"], found["trained"]
    rows: list[list[Cell]] = []
    for category, one in found["categories"].items():
        for prefix, nll, against in zip(prefixes, one["nll"], one["against_trained"], strict=True):
            rows.append([category, one["documents"], prefix, prefix / trained, nll, *against])
    columns = ["held-out", "documents", "prefix", "of trained", "NLL", "against trained", "from", "to"]
    page.add_table("context", Table(columns, rows, digits=4), "What a longer prefix is worth")
    curves = []
    for category, one in found["categories"].items():
        mean, low, high = map(list, zip(*one["against_trained"], strict=True))
        curves.append(Series(category, prefixes, mean, low, high))
    title = f"NLL of the same {found['suffix']} tokens, against a prefix of {trained}"
    panel = Panel(title, curves, "tokens before them", log_x=True)
    caption = (
        f"The model of {found['name']}, {found['parameters']:,} parameters, trained on windows of {trained:,} tokens; "
        f"{found['suffixes']} suffixes of each document. Nats per token, with Student's 95 % interval over documents."
    )
    page.add_figures([Figure("context", [panel], columns=1, size=(8.0, 4.0), caption=caption)])


def main(out: Path, sizes: list[str]) -> None:
    """Measure the faults, or with `sizes` (megabytes) the speed; draw what there is."""
    out.mkdir(parents=True, exist_ok=True)
    here, commit = Path(__file__), _output(["git", "rev-parse", "HEAD"]).strip()
    found = {}
    for size in sizes:
        kind, _, argument = size.rpartition(":")
        script = str(here.with_name(f"measure_{kind or 'speed'}.py"))
        name = f"{kind or 'speed'}-{int(argument):04}" if argument.isdigit() else kind
        found[name] = json.loads(_output([sys.executable, script, argument]).splitlines()[-1])
    found = found or {"faults": measure_faults()}
    said = (re.sub(":.*/.*", ":RUNS", argument).replace("context:RUNS", "context:RUN") for argument in sys.argv[1:])
    command = f"PYTHONPATH=. python tests/data/measure_cleaning.py {' '.join(said)}"
    made = {"command": command, "commit": commit, "seed": SEED, **describe()}
    for name, part in found.items():
        (out / f"part-{name}.json").write_text(json.dumps({"found": part, "made": made}, indent=1) + "\n")
    draw(out)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
