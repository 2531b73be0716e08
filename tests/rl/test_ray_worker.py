"""Rollout workers on a Ray cluster of two nodes, on one machine: the run of one process where nothing may be stale, and
nothing lost when a node dies."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_workers import is_whole, outcome

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.errors import UsageError
from mai_thinking.recipes.grpo import grpo
from mai_thinking.training.metrics import read_records

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100_000_000}
    made = Cluster(initialize_head=True, head_node_args=node | {"num_cpus": 1})
    made.other = made.add_node(**node)
    yield made
    made.shutdown()


def make(tiny_run: Path, folder: Path, *overrides: str) -> GrpoConfig:
    settings = [f"output_dir={folder}", f"init_from={tiny_run / 'final'}", "rollouts.steps_per_update=2", *overrides]
    return load_config(GrpoConfig, ROOT / "configs" / "tiny-grpo.yaml", settings)


def test_nothing_stale_is_the_run_of_one_process(cluster: Any, tiny_run: Path, tmp_path: Path) -> None:
    assert grpo(make(tiny_run, tmp_path / "alone", "rollouts.max_staleness=0")) == 0
    on_ray = ["rollouts.max_staleness=0", "rollouts.workers=2", f"rollouts.ray={cluster.address}"]
    assert grpo(make(tiny_run, tmp_path / "ray", *on_ray)) == 0
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "alone")


def test_a_node_that_dies_takes_nothing_along(cluster: Any, tiny_run: Path, tmp_path: Path) -> None:
    """Two of the three workers run on it. The schedule, done again in one process, gives the same weights."""
    run, settings = tmp_path / "run", ["rollouts.max_staleness=3", "steps=16"]

    def kill() -> None:
        while not any(record["step"] >= 4 for record in read_records(run / "metrics.jsonl") if "kind" not in record):
            time.sleep(0.05)
        cluster.remove_node(cluster.other, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert grpo(make(tiny_run, run, *settings, "rollouts.workers=3", f"rollouts.ray={cluster.address}")) == 0
    assert not killer.is_alive()
    assert is_whole(run)
    assert grpo(make(tiny_run, tmp_path / "again", *settings, f"rollouts.replay={run}")) == 0
    assert outcome(tmp_path / "again") == outcome(run)


def test_no_cluster_is_told_in_a_line(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rollouts\.ray: there is no cluster at '127\.0\.0\.1:1'; .* starts one"):
        grpo(make(tiny_run, tmp_path / "run", "rollouts.workers=1", "rollouts.ray=127.0.0.1:1"))
    with pytest.raises(UsageError, match="say how many"):
        make(tiny_run, tmp_path / "run", "rollouts.ray=auto")
