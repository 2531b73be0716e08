"""Ranks share the work without changing the result: one worker, two replicas, two shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_faults import Job, fault

from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.metrics import read_records

Make = Callable[..., Any]
# Without dropout, whose masks are each rank's own, and without accumulation, whose running counts depend on how it
# cuts; with the balance loss at work. The learning rate is low because top-k is no continuous function: at a high one,
# differences of rounding grow until some token's last expert is another, and then the curves differ by 1e-4.
SAME = [
    "steps=20",
    "evaluation.every=20",
    "model.dropout=0.0",
    "model.router_aux_loss_coef=0.1",
    "batch.micro_batch_size=4",
    "optimizer.learning_rate=5.0e-4",
]


def curves(run: Path) -> dict[str, list[float]]:
    steps = [r for r in read_records(run / "metrics.jsonl") if "kind" not in r]
    return {name: [record[name] for record in steps] for name in ("loss", "balance_loss", "grad_norm")}


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory: pytest.TempPathFactory, tiny_config: Make) -> dict[str, list[float]]:
    job = Job(tmp_path_factory.mktemp("ddp") / "job", tiny_config, *SAME)
    code, output = job.finish()
    assert code == 0, output
    return curves(job.run)


def test_one_worker_gives_the_same_curve(
    two_replicas: dict[str, list[float]], tmp_path: Path, tiny_config: Make
) -> None:
    """The same global batch: 8 rows of one worker, or 4 of each of two."""
    assert pretrain(tiny_config(tmp_path / "one", *SAME, "batch.micro_batch_size=8")) == 0
    one = curves(tmp_path / "one")
    assert len(one["loss"]) == 20
    assert one["loss"] == pytest.approx(two_replicas["loss"], abs=1e-5)
    assert one["balance_loss"] == pytest.approx(two_replicas["balance_loss"], abs=1e-5)


def test_two_shards_train_and_resume_like_two_replicas(
    two_replicas: dict[str, list[float]], tmp_path: Path, tiny_config: Make
) -> None:
    job = Job(tmp_path / "job", tiny_config, *SAME, "execution.parallel=fsdp")
    code, output = job.finish([fault(11, "update", 1)])
    assert code == 0, output
    assert "restarting" in output
    sharded = curves(job.run)
    for name in ("loss", "balance_loss"):
        assert sharded[name] == pytest.approx(two_replicas[name], abs=1e-4)


def test_going_on_with_fewer_workers(two_replicas: dict[str, list[float]], tmp_path: Path, tiny_config: Make) -> None:
    """Stopped after some steps on two, finished on one: the global batch stays what the config says. The one
    accumulates; with activation checkpointing its balance loss is exact."""
    job = Job(tmp_path / "job", tiny_config, *SAME, "execution.activation_checkpointing=true")
    process = job.start()
    job.wait_for(6)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 75
    code, output = job.finish(nproc=1)
    assert code == 0, output
    assert curves(job.run)["loss"] == pytest.approx(two_replicas["loss"], abs=1e-4)
