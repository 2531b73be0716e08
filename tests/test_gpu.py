"""The loops on a GPU, in bf16, from the first weights to a model that has climbed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.recipes.grpo import grpo
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.metrics import read_records

CLIMB = Path(__file__).parents[1] / "configs" / "tiny-grpo.yaml"


@pytest.mark.gpu
def test_from_nothing_to_a_climb(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(tiny_config(run)) == 0
    losses = [record["loss"] for record in read_records(run / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1
    assert len(list((run / "checkpoints").iterdir())) == 2  # of four that were saved
    assert grpo(load_config(GrpoConfig, CLIMB, [f"output_dir={tmp_path / 'climb'}", f"init_from={run / 'final'}"])) == 0
    records = read_records(tmp_path / "climb" / "metrics.jsonl")
    assert max(record["step"] for record in records) == 6
    assert max(record["mismatch"] for record in records if "mismatch" in record) < 0.1
