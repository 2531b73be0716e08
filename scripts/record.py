"""What a run made of its minutes, beside an honest yardstick: `python scripts/record.py RUN … --out results/two-cores`.

RUNs are finished pre-training runs of one config that differ in their seed. Beside their held-out bits per byte stands
PPMd that has read the same training text first (extra `record`), and what `xz -9e` and `gzip -9` make of the held-out
text alone. A record joins those that `--out` has already. `--tried` are the paired trials that
results/two-cores/trial.py left, `--rivals` what results/two-cores/rivals.py left of other models in the same minutes,
`--copying` what results/two-cores/copying.py found, `--longer` runs of the best record's recipe with more steps: each
is a table of its own.
"""

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mai_thinking.config.base import Count
from mai_thinking.config.command import Parser, exit_with, option

BITS, MEMORY, GROUP = "bits_per_byte/", 2**30, 20_000
NOTES = {
    "With more steps": "The best record's recipe with other `steps`, so that the rate falls over all of them. Minutes "
    "are those that the run took, on a machine that was shared; by steps timed by turns they are fewer.",
    "In the same minutes": "By results/two-cores/rivals.py, with configs/two-cores.yaml as it was at each line's "
    "commit: the same tokens in the same order, the same tokenizer, all that is held out. Minutes are steps by the "
    "time of one, measured by turns: the processor's on one core, the clock's on two. Commit and machine of each line "
    "are in rivals.jsonl.",
    "With n-grams": "By results/two-cores/memory.py, of seed 0: an n-gram model of all that the run has read, and the "
    "mixture of both, whose weights are learned on the other half of the held-out documents.",
    "Copying": "By results/two-cores/copying.py. So many tokens by chance, and the same again: nats per token the "
    "first time, and the second. Held-out bits per byte beside it.",
    "How soon copying is learned": "By `results/two-cores/copying.py learn STEPS SEED KEY=VALUE …`: the first steps of "
    "the record's own schedule with these keys changed, the same rows. The loss is the mean of 200 steps, nats "
    "per token; seconds are one core's.",
}


def main() -> None:
    """Parse, measure, write."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs, one a seed")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--name", help="of the record; without it that of the first run")
    parser.add_argument("--orders", type=option(Count), nargs="+", default=[5, 6, 8], help="of PPMd")
    parser.add_argument("--samples", type=option(Count), default=200, help="functions that are written, and parsed")
    parser.add_argument("--tried", type=Path, help="a JSONL file of paired trials")
    parser.add_argument("--rivals", type=Path, help="a JSONL file of other models, timed and scored")
    parser.add_argument("--copying", type=Path, help="a JSONL file of what runs copy")
    parser.add_argument("--longer", nargs="+", type=Path, default=[], help="runs of the best record with more steps")
    options = parser.parse_args()

    page = options.out / "summary.json"
    known = json.loads(page.read_text()) if page.exists() else {}
    records = {record["name"]: record for record in known.get("records", [])}
    if options.runs:
        new = measure(options.runs, options.orders, options.samples, list(records.values()))
        new["name"] = options.name or new["name"]
        records[new["name"]] = new
    tried = compare(options.tried) if options.tried else known.get("tried", [])
    rivals = against(options.rivals, list(records.values())) if options.rivals else known.get("rivals", [])
    mixed = mixtures(options.rivals) if options.rivals else known.get("mixed", [])
    done, begun = copied(options.copying) if options.copying else (known.get("copying", []), known.get("learning", []))
    longer = {record["name"]: record for record in known.get("longer", [])}
    for run in options.longer:
        record = measure([run], options.orders, options.samples, list(longer.values()))
        longer[record["name"]] = record
    ordered, more = (sorted(found.values(), key=lambda record: -record["weighted"]) for found in (records, longer))
    write(options.out, ordered, tried, rivals, mixed, done, begun, more)


def measure(
    folders: Sequence[Path], orders: Sequence[int], samples: int, known: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A record: means over the runs in `folders`, the weighted score with Student's 95 % interval. What compressors
    make of a text that one of the `known` records has read too is taken from there."""
    from mai_thinking.bench.machine import describe
    from mai_thinking.experiments.climb_run import commits_of
    from mai_thinking.report.comparison import student
    from mai_thinking.report.reading import Run
    from mai_thinking.training.model_files import load_model_and_tokenizer
    from mai_thinking.training.sampling import share_parsed

    runs = [Run(folder) for folder in folders]
    ends = [run.evaluations[-1] for run in runs]
    names = [name for name in ends[0] if name.startswith(BITS)]
    read, held_out = texts_of(folders[0])
    digest = hashlib.sha256(read + repr(held_out).encode()).hexdigest()
    same = [record["yardsticks"] for record in known if record["read"] == digest]
    weighted, low, high = student([end["bits_per_byte"] for end in ends])
    return {
        "name": runs[0].name,
        "seeds": [run.config["seed"] for run in runs],
        "tokens": runs[0].steps[-1]["tokens"],
        "minutes": fmean(run.minutes for run in runs),
        "seconds_per_step": median(step["seconds"] for run in runs for step in run.steps),
        "weighted": weighted,
        "interval": None if low is None else [low, high],
        "curve": {end["step"]: end["bits_per_byte"] for end in runs[0].evaluations},
        "bits_per_byte": {name.removeprefix(BITS): fmean(end[name] for end in ends) for name in names},
        "eq3": fmean(end["normalised"] for end in ends) if "normalised" in ends[0] else None,
        "parsed": fmean(
            share_parsed(*load_model_and_tokenizer(folder / "final"), samples=samples, tokens=100) for folder in folders
        ),
        "yardsticks": same[0] if same else yardsticks(read, held_out, orders),
        "read": digest,
        "commits": commits_of(folders),
        "machine": describe(),
    }


def texts_of(folder: Path) -> tuple[bytes, dict[str, list[str]]]:
    """What the run in `folder` read, row by row as its loader made it, and what was held out, by category."""
    from mai_thinking.config.loading import load_config
    from mai_thinking.config.pretraining import PretrainConfig
    from mai_thinking.data import prepare
    from mai_thinking.recipes.pretrain import make_loader

    config = load_config(PretrainConfig, folder / "config.yaml")
    data = prepare(config.data, log=print)
    with make_loader(config, data) as loader:
        rows = [row for _ in range(config.steps) for batch in next(loader).micro_batches for row in batch["input_ids"]]
    read = "".join(data.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows)
    return read.encode(), {
        name: [document.text for document in found] for name, found in data.held_out.items() if found
    }


def yardsticks(read: bytes, held_out: dict[str, list[str]], orders: Sequence[int]) -> dict[str, dict[str, float]]:
    """Bits per byte of the held-out text, by compressor and category: PPMd behind what was `read`, each document by
    itself, or a few short ones; `xz` and `gzip` without, all documents in one."""
    import pyppmd

    from mai_thinking.training.evaluation import compressors

    found: dict[str, dict[str, float]] = defaultdict(dict)
    for order in orders:
        coder = pyppmd.Ppmd7Encoder(order, MEMORY)
        coder.encode(read)
        for category, texts in held_out.items():
            size = sum(in_a_fork(partial(coded_size, coder, group.encode())) for group in grouped(texts))
            found[f"PPMd {order}"][category] = 8 * size / sum(len(text.encode()) for text in texts)
    for category, texts in held_out.items():
        for name, value in compressors(texts).items():
            found[name][category] = value
    return found


def grouped(texts: Sequence[str]) -> Iterator[str]:
    """Documents, the short ones joined up to `GROUP` characters: a fork for each of thousands would take minutes."""
    group = ""
    for text in texts:
        group += text
        if len(group) >= GROUP:
            yield group
            group = ""
    if group:
        yield group


def coded_size(coder: Any, text: bytes) -> int:
    """Bytes that a coder needs for `text`; the few that it holds back of what came before count too."""
    return len(coder.encode(text)) + len(coder.flush(endmark=False))


def in_a_fork(work: Callable[[], int]) -> int:
    """What `work` returns, done in a copy of this process: the next document finds the coder as this one did, as it
    finds the model."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, str(work()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        result = int(answer.read())
    os.waitpid(child, 0)
    return result


def compare(path: Path) -> list[dict[str, Any]]:
    """What each trial in a JSONL file gained over the run `base` of its tokens and seed: weighted bits per byte, with
    Student's 95 % interval; and the same at equal time, where more time is charged what the baseline gains in it."""
    from mai_thinking.report.comparison import student

    trials = [json.loads(line) for line in path.read_text().splitlines()]
    base = {(t["tokens"], t["seed"]): t for t in trials if t["name"] == "base"}
    ends = sorted({tokens for tokens, _ in base})
    mean = {tokens: fmean(t["weighted"] for (n, _), t in base.items() if n == tokens) for tokens in ends}
    doublings = math.log2(ends[-1] / ends[0])
    per_doubling = (mean[ends[0]] - mean[ends[-1]]) / doublings if doublings else math.nan
    groups: dict[tuple[str, int], list[tuple[Any, Any]]] = defaultdict(list)
    for trial in trials:
        if trial["name"] != "base" and (key := (trial["tokens"], trial["seed"])) in base:
            groups[trial["name"], trial["tokens"]].append((base[key], trial))
    rows = []
    for (name, tokens), pairs in groups.items():
        gain, low, high = student([b["weighted"] - t["weighted"] for b, t in pairs])
        ratio = median(t["seconds"] / b["seconds"] for b, t in pairs)
        row = {"tried": name, "what": pairs[0][1]["what"], "tokens, M": tokens / 1e6, "seeds": len(pairs)}
        row |= {"gain": gain, "low": low, "high": high, "time": ratio}
        row["at equal time"] = gain - per_doubling * math.log2(ratio)
        rows.append(row | {c: fmean(b["bits"][c] - t["bits"][c] for b, t in pairs) for c in pairs[0][1]["bits"]})
    return sorted(rows, key=lambda row: -row["gain"])


def against(path: Path, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each model of a JSONL file, means over its seeds, and of the `records` those that were timed with it. Minutes are
    steps by the time of one, measured by turns: those that a run took, on a machine that others use, do not compare."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = {(line["name"], line["cores"]): line for line in lines if line["kind"] == "time"}
    groups: dict[tuple[str, str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "run":
            groups[line["name"], line["what"], line["tokens"], line["cores"]].append(line)
    for record in records:
        for _, cores in (key for key in times if key[0] == record["name"]):
            same = {"weighted": record["weighted"], "bits": record["bits_per_byte"]}
            groups[record["name"], record["name"], record["tokens"], cores] = [same] * len(record["seeds"])
    rows = []
    for (name, what, tokens, cores), runs in groups.items():
        timed = times[name.partition("@")[0], cores]
        step, steps = timed["seconds"], tokens // timed["tokens"]
        total, active = (count / 1e6 for count in timed["parameters"])
        row = {"model": what, "cores": cores, "parameters, M": total, "active, M": active}
        row |= {
            "seconds a step": step,
            "steps": steps,
            "tokens, M": tokens / 1e6,
            "minutes": step * steps / 60,
            "seeds": len(runs),
        }
        row["weighted"] = fmean(run["weighted"] for run in runs)
        rows.append(row | {category: fmean(run["bits"][category] for run in runs) for category in runs[0]["bits"]})
    return sorted(rows, key=lambda row: row["weighted"])


def mixtures(path: Path) -> list[dict[str, Any]]:
    """What results/two-cores/memory.py left: a run's model, n-grams of the same tokens, and both."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in map(json.loads, path.read_text().splitlines()):
        if line["kind"] == "memory":
            groups[line["what"]].append(line)
    return [
        {"model": what, "seeds": len(lines), "weighted": fmean(line["weighted"] for line in lines)}
        | {category: fmean(line["bits"][category] for line in lines) for category in lines[0]["bits"]}
        for what, lines in groups.items()
    ]


def copied(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What results/two-cores/copying.py left, a row a run: of finished ones, and of first steps."""
    done, begun = list[dict[str, Any]](), list[dict[str, Any]]()
    for line in map(json.loads, path.read_text().splitlines()):
        if "run" in line:
            done.append({key: line[key] for key in ("run", "seed", "weighted")} | line["bits"])
        else:
            begun.append({"changed": ", ".join(line["changed"]) or "nothing"})
            begun[-1] |= {key: line[key] for key in ("steps", "seed", "loss")} | {"seconds a step": line["seconds"]}
        for length, (first, second) in line["nats"].items():
            (done if "run" in line else begun)[-1] |= {f"{length} tokens": first, f"{length} again": second}
    return done, begun


def scores(records: Sequence[dict[str, Any]]) -> str:
    """A table of records, each with its compressors below it."""
    from mai_thinking.config.table import Interval, Table

    rows, categories = [], list(records[0]["bits_per_byte"])
    for record in records:
        interval, weighted = record.get("interval"), record["weighted"]
        told = [record["minutes"], record["tokens"] / 1e6, len(record["seeds"])]
        told += [Interval(weighted, *interval) if interval else weighted]
        rows.append([record["name"], *told, *record["bits_per_byte"].values(), record["parsed"]])
        rows += [[n, *[None] * 4, *(v[c] for c in categories), None] for n, v in record["yardsticks"].items()]
    columns = ["", "minutes", "tokens, M", "seeds", "weighted", *categories, "parsed"]
    return Table(columns, rows).markdown()


def write(
    out: Path,
    records: Sequence[dict[str, Any]],
    tried: Sequence[dict[str, Any]],
    rivals: Sequence[dict[str, Any]] = (),
    mixed: Sequence[dict[str, Any]] = (),
    copying: Sequence[dict[str, Any]] = (),
    learning: Sequence[dict[str, Any]] = (),
    longer: Sequence[dict[str, Any]] = (),
) -> None:
    """summary.md and summary.json."""
    from mai_thinking.config.table import Table
    from mai_thinking.report.document import Document

    page = Document(out.name)
    if records:
        best = records[-1]
        page.facts |= {"best": {key: best[key] for key in ("bits_per_byte", "minutes", "seeds")}, "records": records}
        page.facts["longer"] = longer
        page.add(scores(records), heading="Records: held-out bits per byte")
        page.add(
            "Below each record: compressors on the same bytes. PPMd has read that run's training text first. "
            "In brackets Student's 95 % interval of the mean over seeds."
        )
        page.add("Weighted bits per byte at a step; before the last one on the first bytes of what is held out:")
        for record in (*records, *longer):
            page.add(f"`{record['name']}`: " + ", ".join(f"{s} {bits:.3f}" for s, bits in record["curve"].items()))
        for record in (*records, *longer):
            machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
            page.add(f"`{record['name']}`: commit {', '.join(record['commits'])}; {machine}.")
        if longer:
            page.add(scores([best, *longer]), NOTES["With more steps"], heading="With more steps")
    page.facts |= {"tried": tried, "rivals": rivals, "mixed": mixed, "copying": copying, "learning": learning}
    tables = [("In the same minutes", rivals, 3), ("With n-grams", mixed, 3), ("Copying", copying, 3)]
    tables += [("How soon copying is learned", learning, 3)]
    for heading, found, digits in (*tables, ("Tried", tried, 4)):
        if found:
            rows = [list(row.values()) for row in found]
            page.add(Table(list(found[0]), rows, digits).markdown(), heading=heading)
            page.add(*filter(None, [NOTES.get(heading)]))
    page.write(out)
    print(f"{out}/summary.md")


if __name__ == "__main__":
    exit_with(main)
