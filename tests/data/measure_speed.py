"""Speed by stage and peak memory of a preparation with every stage on, in this process alone: `measure_speed.py MB`
prints JSON. Seconds are of the processor, so that a busy machine does not count.

The text: Python files of the packages that are installed, each once, then documents of random words with Zipf's
frequencies, of which every twelfth is a near copy of the one before.
"""

import itertools
import json
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

time.perf_counter = time.process_time  # before anything takes the time

from mai_thinking.config.data import DataSection  # noqa: E402
from mai_thinking.data import prepare  # noqa: E402

EVERYTHING: dict[str, Any] = {"boilerplate": {}, "templates": {}, "semantic": {}, "fuzzy_decontamination": {}}


def texts(megabytes: float) -> Iterator[str]:
    """Up to half of it real."""
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        if size > megabytes * 5e5:
            break
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        size += len(text.encode())
        yield text
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(draw.choice(letters, draw.integers(2, 10))) for _ in range(50_000)])
    shares = 1 / np.arange(3, len(words) + 3)
    ends = np.cumsum(shares / shares.sum())
    chosen = words[:1]
    for number in itertools.count():
        if size > megabytes * 1e6:
            return
        if number % 12 == 11:
            chosen[draw.integers(0, len(chosen), 8)] = words[draw.integers(0, len(words), 8)]
        else:
            chosen = words[np.minimum(np.searchsorted(ends, draw.random(draw.integers(200, 1500))), len(words) - 1)]
        text = "\n".join(" ".join(chosen[i : i + 14]) for i in range(0, len(chosen), 14)) + "\n"
        size += len(text)
        yield text


def measure(megabytes: float, folder: Path, cleaning: dict[str, Any]) -> dict[str, Any]:
    """A preparation of so much text, in numbers."""
    path = folder / "text.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for text in texts(megabytes):
            file.write(json.dumps({"text": text}) + "\n")
    source = {
        "name": "text", "kind": "jsonl", "path": str(path), "category": "general", "licence": "mixed",
        "provenance": "human", "weight": 1,
    }  # fmt: skip
    tree = {"sources": [source], "cleaning": cleaning, "cache_dir": str(folder / "cache")}
    config = DataSection.model_validate(tree)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = prepare(config)
    counts = data.manifest["sources"]["text"]["counts"]
    size = counts["read"][1] / 1e6
    seconds = data.manifest["seconds"]
    return {
        "mb": size, "documents": counts["read"][0], "kept_documents": counts["kept"][0], "dropped": counts["dropped"],
        "mb_per_s": {name: size / max(value, 0.01) for name, value in seconds.items()} | {
            "all": size / sum(value for name, value in seconds.items() if ":" not in name)
        },
        "gb_before": before / 1e6, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        chosen = {} if sys.argv[2:] == ["default"] else EVERYTHING
        print(json.dumps(measure(float(sys.argv[1]), Path(name), chosen)))
