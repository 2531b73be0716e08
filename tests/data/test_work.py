"""A preparation that is killed goes on: the same bytes, whenever it was killed, by however many processes."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from shard_tasks import bytes_of, die_once, stored

from conftest import Corpus, source
from mai_thinking.data import documents
from mai_thinking.data.words import RunCounts
from mai_thinking.data.work import Work

EVERYTHING = {"boilerplate": {"across": 3}, "templates": {}, "semantic": {}, "fuzzy_decontamination": {}}


def test_a_killed_worker_costs_its_shard_alone(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_SHARD", 1000)
    work = Work(tmp_path / "work", processes=2)
    found = stored(work, corpus.documents(30))
    assert len(found.shards()) > 4
    parts = work.each("sizes", partial(die_once, tmp_path / "marker"), found)
    assert (tmp_path / "marker").exists()
    assert parts.all("sizes").tolist() == found.records["size"].tolist()
    assert os.getpid() not in parts.all("of")[: len(found.shards()[0])]
    path = next((tmp_path / "work" / "sizes").glob("0.npz"))
    before = path.stat().st_mtime_ns
    work.each("sizes", bytes_of, found)
    assert path.stat().st_mtime_ns == before


LEFT = """
import sys
import time
from functools import partial
from pathlib import Path
from shard_tasks import loiter, stored
from mai_thinking.data import documents
from mai_thinking.data.work import Work
if __name__ == "__main__":
    documents._SHARD = 100
    with Work(Path(sys.argv[1]) / "work", processes=2) as work:
        work.each("none", partial(loiter, Path(sys.argv[1])), stored(work, ["some text " * 9] * 12))
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_preparation(tmp_path: Path, sent: signal.Signals) -> None:
    """What they wrote later would come between the next one and its files; and Ctrl-C waits for nothing queued."""
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    main = subprocess.Popen([sys.executable, "-c", LEFT, str(tmp_path)], env=os.environ | {"PYTHONPATH": places})
    workers: list[int] = []
    end = time.monotonic() + 120
    while len(workers) < 2 and time.monotonic() < end:
        workers = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
        time.sleep(0.05)
    assert len(workers) == 2
    main.send_signal(sent)
    if sent == signal.SIGINT:
        os.kill(workers[0], signal.SIGINT)  # the terminal's goes to all
        os.kill(workers[1], signal.SIGINT)
    main.wait(60)
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_count_stays_at_the_most_that_it_can_be() -> None:
    counts = RunCounts(np.array([250, 0], dtype=np.uint8))
    counts.add(np.array([0, 1], dtype=np.uint64), np.array([10, 3], dtype=np.uint8))
    assert counts.table.tolist() == [255, 3]


KILLED = """
import json, os, signal, sys
from pathlib import Path
import sklearn.cluster, sklearn.decomposition, sklearn.feature_extraction.text
from mai_thinking.config.data import DataSection
from mai_thinking.data import documents, prepare

documents._SHARD = 16000
config, kills, replace = json.loads(sys.argv[1]), 0, os.replace


def attempt(kill):
    left = [2 + kill % 2]
    def replace_or_die(*paths):
        left[0] -= 1
        if left[0] == 0 and kill % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    if kill >= 0:
        os.replace = replace_or_die
    prepare(DataSection.model_validate(config))
    os._exit(0)


for kill in [*range(int(sys.argv[2])), -1]:
    child = os.fork() or attempt(kill)
    status = os.waitpid(child, 0)[1]
    kills += os.WIFSIGNALED(status)
    if status == 0:
        break
print(kills, os.waitstatus_to_exitcode(status))
"""
"""Kills itself in turn behind the second file that it finishes, and before it finishes the third: a text and what is
known of it are two."""


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_preparation_killed_at_every_step_gives_the_same_bytes(
    everything: bool, corpus: Corpus, tmp_path: Path
) -> None:
    texts = corpus.documents(60)
    texts += [f"{corpus.document(40)}\nthe same line in many of them\n" for _ in range(6)] + texts[:3]
    benchmark = tmp_path / "benchmark.json"
    benchmark.write_text(json.dumps([texts[9].split("\n")[0] + " " + texts[9].split("\n")[1]]))
    sources = [source("a", corpus.jsonl("a.jsonl", texts)), source("b", corpus.jsonl("b.jsonl", corpus.documents(30)))]
    outcomes = []
    for kills in (0, 300):
        tree = {"sources": sources, "tokenizer": {"vocab_size": 400}, "cache_dir": str(tmp_path / f"cache {kills}")}
        tree["cleaning"] = {"benchmarks": [str(benchmark)], "drop_order": ["b"], **(EVERYTHING if everything else {})}
        command = [sys.executable, "-c", KILLED, json.dumps(tree), str(kills)]
        done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        (folder,) = (path for path in (tmp_path / f"cache {kills}").iterdir() if path.is_dir())  # no work is left
        files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        manifest = json.loads(files.pop(Path("manifest.json")))
        assert manifest.pop("seconds")
        outcomes.append((files, manifest))
        assert done[1] == "0"
        assert int(done[0]) == 0 if not kills else 5 < int(done[0]) < kills
    (files, manifest), (others, other) = outcomes
    assert {name for name in files | others if files.get(name) != others.get(name)} == set()
    assert manifest == other
    counts = manifest["sources"]["a"]["counts"]
    assert counts["dropped"]["exact_duplicates"][0] == 3
    if everything:
        assert counts["cut"]["boilerplate"][0] == 6
        assert counts["cut"]["decontamination"][0] >= 1
