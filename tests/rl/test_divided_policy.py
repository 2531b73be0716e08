"""Reinforcement learning of a policy that ranks divide: by FSDP, by experts, by both."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import CONFIG, gradients_of, rank_gradients, some_groups

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.recipes.grpo import grpo
from mai_thinking.rl.engine import inference_copy
from mai_thinking.rl.policy_model import memory_of_policy, policy_config
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model
from ranks import run_ranks

Make = Callable[..., GrpoConfig]
FEW_STEPS = ["steps=3", "optimizer.learning_rate=1.0e-5", "rollouts.steps_per_update=1", "evaluation.problems=2"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel": "fsdp"},
    "expert_parallel": {"expert_parallel": 2},
    "expert_parallel_fsdp": {"parallel": "fsdp", "expert_parallel": 2},
}


@pytest.fixture(scope="module")
def make(tiny_run: Path) -> Make:
    """A few steps of configs/tiny-grpo.yaml from the tiny base."""

    def config(folder: Path, *overrides: str) -> GrpoConfig:
        places = [f"output_dir={folder}", f"init_from={tiny_run / 'final'}"]
        return load_config(GrpoConfig, CONFIG, [*places, *FEW_STEPS, *overrides])

    return config


def climb_as_rank(rank: int, config: GrpoConfig) -> int:
    os.environ.update(LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    return grpo(config)


@pytest.fixture(scope="module")
def two_replicas(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("replicas") / "run"
    assert run_ranks(2, climb_as_rank, make(run)) == [0, 0]
    return run


def test_dry_run_knows_the_engine(make: Make, tmp_path: Path) -> None:
    """In fp32, and in bf16 what products take."""
    config = make(tmp_path / "run")
    architecture = policy_config(config)
    model = load_model(config.init_from)
    for precision, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        config = make(tmp_path / "run", f"execution.precision={precision}")
        expected = sum(parameter.nbytes for parameter in inference_copy(model, dtype).parameters())
        assert memory_of_policy(config, architecture, 2)["engine"] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(layout: str) -> None:
    """Also with different numbers of micro-batches on the ranks."""
    whole = gradients_of(some_groups(), rows=8)
    for result in run_ranks(2, rank_gradients, 2, LAYOUTS[layout]):
        for name, gradient in result.items():
            torch.testing.assert_close(torch.from_numpy(gradient), whole[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_climb_of_divided_models_is_that_of_replicas(
    two_replicas: Path, make: Make, tmp_path: Path, layout: str
) -> None:
    """The engine gets the learner's weights whole: it draws the same rollouts, and agrees with the learner."""
    told = [f"execution.{key}={value}" for key, value in LAYOUTS[layout].items()]
    assert run_ranks(2, climb_as_rank, make(tmp_path / "run", *told)) == [0, 0]
    names = ("loss", "grad_norm", "reward", "entropy", "pass@1", "response_length")
    curves = [
        [record[name] for record in read_records(run / "metrics.jsonl") for name in names if name in record]
        for run in (tmp_path / "run", two_replicas)
    ]
    assert len(curves[0]) > 3 * 5
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    steps = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if "mismatch" in record]
    assert max(record["mismatch"] for record in steps) < 1e-5
    ours, theirs = (dict(load_model(run / "final").named_parameters()) for run in (tmp_path / "run", two_replicas))
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, atol=1e-6, rtol=1e-5, msg=name)
