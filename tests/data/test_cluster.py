"""A preparation on a Ray cluster of two nodes, on one machine: the bytes of one machine, though a node dies."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from shard_tasks import stored, wait_on_a_worker

from conftest import Corpus, source
from mai_thinking.config.data import DataSection
from mai_thinking.data import PreparedData, documents, prepare
from mai_thinking.data.work import Work
from mai_thinking.errors import UsageError

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EVERYTHING = {"boilerplate": {"across": 3}, "templates": {}, "semantic": {}, "fuzzy_decontamination": {}}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes, each with room for one task; `cluster.other` may die."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # or whatever else this machine does comes first
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(documents, "_SHARD", 4000)
    node: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000}
    made: Any = Cluster(initialize_head=True, head_node_args=node)
    made.other = made.add_node(**node)
    yield made
    made.shutdown()


def kill_when(found: Callable[[], bool], cluster: Any) -> threading.Thread:
    """Kill the other node as soon as something is `found`."""

    def kill() -> None:
        while not found():
            time.sleep(0.01)
        cluster.remove_node(cluster.other, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    return killer


def test_a_dead_node_costs_its_shards_alone(cluster: Any, corpus: Corpus, tmp_path: Path) -> None:
    """The one that it had under way is tried once more, on the other; no other one is."""
    doomed = cluster.other.node_id
    (tmp_path / "doomed").write_text(doomed)

    def tries() -> dict[str, list[str]]:
        return {path.stem: path.read_text().split() for path in tmp_path.glob("* tried")}

    def half_done() -> bool:
        return [doomed] in tries().values() and len(list((tmp_path / "work" / "sizes").glob("*.npz"))) >= 3

    with Work(tmp_path / "work", cluster.address) as work:
        found = stored(work, corpus.documents(50))
        assert len(found.shards()) > 6
        killer = kill_when(half_done, cluster)
        parts = work.each("sizes", partial(wait_on_a_worker, tmp_path), found)
        assert parts.all("sizes").tolist() == found.records["size"].tolist()
    assert not killer.is_alive()
    assert len(tries()) == len(found.shards())
    ((first, second),) = [tried for tried in tries().values() if len(tried) > 1]
    assert first == doomed != second


def test_a_cluster_gives_the_bytes_of_one_machine(cluster: Any, corpus: Corpus, tmp_path: Path) -> None:
    """Every stage on; a node dies in one of them."""
    texts = corpus.documents(60)
    texts += [f"{corpus.document(40)}\nthe same line in many of them\n" for _ in range(6)] + texts[:3]
    path = corpus.jsonl("a.jsonl", texts)

    def prepared(cache: Path, ray: str | None) -> PreparedData:
        tree = {"sources": [source("a", path)], "tokenizer": {"vocab_size": 400}, "cleaning": EVERYTHING}
        return prepare(DataSection.model_validate(tree | {"cache_dir": str(cache), "ray": ray}))

    alone = prepared(tmp_path / "alone", None)
    killer = kill_when(lambda: any((tmp_path / "ray").glob(".*.work/words/*.npz")), cluster)
    on_ray = prepared(tmp_path / "ray", cluster.address)
    assert not killer.is_alive()
    assert alone.manifest["sources"]["a"]["counts"]["cut"]["boilerplate"][0] == 6
    files = {path.relative_to(alone.folder): path.read_bytes() for path in alone.folder.rglob("*") if path.is_file()}
    others = {path.relative_to(on_ray.folder): path.read_bytes() for path in on_ray.folder.rglob("*") if path.is_file()}
    del files[Path("manifest.json")], others[Path("manifest.json")]
    assert {name for name in files | others if files.get(name) != others.get(name)} == set()
    assert alone.manifest | {"seconds": 0} == on_ray.manifest | {"seconds": 0}


def test_no_cluster_is_told_in_a_line(corpus: Corpus, section: Callable[..., DataSection], tmp_path: Path) -> None:
    config = section(source("a", corpus.jsonl("a.jsonl", corpus.documents(40))), ray="127.0.0.1:1")
    with pytest.raises(UsageError, match=r"data\.ray: there is no cluster at '127\.0\.0\.1:1'; .* starts one"):
        prepare(config)
