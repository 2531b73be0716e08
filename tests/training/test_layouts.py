"""Whole runs in every layout of ranks: from fresh weights over evaluation and checkpoints to the model folder, they are
one process's; and a checkpoint goes on in another layout on another number of ranks."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model
from ranks import run_ranks

Make = Callable[..., Any]
SAME = [
    "steps=4",
    "schedule.warmup_steps=1",
    "model.dropout=0.0",
    "model.router_aux_loss_coef=0.1",
    "batch.micro_batch_size=2",
    "execution.activation_checkpointing=true",  # with accumulation, the balance loss is exact
    "optimizer.learning_rate=5.0e-4",
    "checkpoint.every=2",
    "evaluation.every=2",
    "evaluation.sample_tokens=4",
]
FSDP, EP = "execution.parallel=fsdp", "execution.expert_parallel"
LAYOUTS = {
    "fsdp": (2, [FSDP]),
    "expert_parallel": (2, [f"{EP}=2"]),
    "expert_parallel_replicated": (4, [f"{EP}=2"]),
    "expert_parallel_fsdp": (4, [FSDP, f"{EP}=2"]),
}
"""Ranks and what they are told."""


def as_rank(rank: int, config: Any) -> int:
    os.environ.update(LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    return pretrain(config)


def curve(run: Path) -> list[float]:
    records = read_records(run / "metrics.jsonl")
    names = ("loss", "balance_loss", "grad_norm", "bits_per_byte")
    return [record[name] for record in records for name in names if name in record]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_config: Make) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    assert pretrain(tiny_config(run, *SAME)) == 0
    return run


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory, tiny_config: Make) -> Callable[[str], Path]:
    """`divided(layout)`: a run's folder."""

    @functools.cache
    def run(layout: str) -> Path:
        ranks, told = LAYOUTS[layout]
        folder = tmp_path_factory.mktemp(layout) / "run"
        assert run_ranks(ranks, as_rank, tiny_config(folder, *SAME, *told)) == [0] * ranks
        return folder

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_that_of_one_process(alone: Path, divided: Callable[[str], Path], layout: str) -> None:
    run = divided(layout)
    expected = curve(alone)
    assert len(expected) == 4 * 3 + 2
    assert curve(run) == pytest.approx(expected, abs=1e-5)
    assert_same_model(run / "final", alone / "final")
    for name in ("config.json", "generation_config.json"):
        assert (run / "final" / name).read_text() == (alone / "final" / name).read_text()


def test_expert_parallel_and_fsdp_go_on_in_another_layout(
    alone: Path, divided: Callable[[str], Path], tiny_config: Make, tmp_path: Path
) -> None:
    """From the checkpoint of step 2, that four ranks wrote: on two, and on one."""
    first = tmp_path / "four"
    shutil.copytree(divided("expert_parallel_fsdp"), first)
    shutil.rmtree(first / "final")
    shutil.rmtree(first / "checkpoints" / "step-00000004")
    (first / "evaluations.jsonl").unlink()
    for ranks, told in ((2, [f"{EP}=2"]), (1, [])):
        run = tmp_path / f"on-{ranks}"
        shutil.copytree(first, run)
        assert run_ranks(ranks, as_rank, tiny_config(run, *SAME, *told)) == [0] * ranks
        assert curve(run) == pytest.approx(curve(alone), abs=1e-5)
        assert_same_model(run / "final", alone / "final")


def assert_same_model(mine: Path, theirs: Path) -> None:
    ours, others = load_file(mine / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert ours.keys() == others.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    load_model(mine)
