"""Speed and peak memory by stage of a preparation with every stage on: `measure_speed.py MB` → JSON. Seconds are of the
processor, this process's and its workers', so that a busy machine does not count, and the whole may be stopped and
continued (`kill -STOP`); `taskset -c 1` keeps all of it in one process. `TMPDIR` says where the text and what is made
of it lie: four times its size.

The text: Python files of the packages that are installed, each once, then documents of random words with Zipf's
frequencies, of which every twelfth is a near copy of the one before.
"""

import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil


def _processes() -> list[psutil.Process]:
    """This one and its workers, which stay until the end."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


time.perf_counter = lambda: sum(sum(one.cpu_times()[:4]) for one in _processes())  # before anything takes the time

from mai_thinking.config.data import DataSection  # noqa: E402
from mai_thinking.config.storage import atomic_file  # noqa: E402
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


def corpus(megabytes: float, cleaning: dict[str, Any]) -> tuple[DataSection, Path]:
    """How to prepare so much text, in a folder that `TMPDIR` is to have room for. The text stays there for others."""
    folder = Path(tempfile.gettempdir()) / f"corpus-{megabytes:.0f}"
    path = folder / "text.jsonl"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts(megabytes))
    source = {
        "name": "text", "kind": "jsonl", "path": str(path), "category": "general", "licence": "mixed",
        "provenance": "human", "weight": 1,
    }  # fmt: skip
    tree = {"sources": [source], "cleaning": cleaning, "cache_dir": str(folder / "cache")}
    return DataSection.model_validate(tree), folder


def measure(megabytes: float, cleaning: dict[str, Any]) -> dict[str, Any]:
    """A preparation of so much text, in numbers."""
    config, folder = corpus(megabytes, cleaning)
    before, peaks = sum(_peaks_gb()), dict[str, list[float]]()

    def stage_ended(line: str) -> None:
        if stage := re.match("data: (.*) took", line):
            peaks[stage[1]] = _peaks_gb()
            print(line, *(f"{peak:.2f} GB" for peak in peaks[stage[1]]), file=sys.stderr, flush=True)

    shutil.rmtree(folder / "cache", ignore_errors=True)
    data = prepare(config, log=stage_ended)
    shutil.rmtree(folder / "cache")
    counts = data.manifest["sources"]["text"]["counts"]
    size = counts["read"][1] / 1e6
    seconds = data.manifest["seconds"]
    return {
        "mb": size, "documents": counts["read"][0], "kept_documents": counts["kept"][0], "dropped": counts["dropped"],
        "mb_per_s": {name: size / max(value, 0.01) for name, value in seconds.items()} | {
            "all": size / sum(value for name, value in seconds.items() if ":" not in name)
        },
        "gb_before": before, "peak_gb": max(map(sum, peaks.values())), "largest_gb": max(map(max, peaks.values())),
        "stage_gb": {stage: sum(one) for stage, one in peaks.items()}, "process_gb": peaks,
        "processes": len(os.sched_getaffinity(0)),
        "files": {name: file["xxh3"] for name, file in data.manifest["files"].items()},
    }  # fmt: skip


def _peaks_gb() -> list[float]:
    """The most memory since it was asked before, of this process and of each other."""
    peaks = []
    for process in _processes():
        place = Path(f"/proc/{process.pid}")
        kilobytes = re.search(r"VmHWM:\s+(\d+)", (place / "status").read_text())
        (place / "clear_refs").write_text("5")
        assert kilobytes
        peaks.append(int(kilobytes[1]) / 1e6)
    return peaks


if __name__ == "__main__":
    print(json.dumps(measure(float(sys.argv[1]), {} if sys.argv[2:] == ["default"] else EVERYTHING)))
