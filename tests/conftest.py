"""A finished tiny run that several tests look at, and the config that it came from."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.report import conclude

CONFIGS = Path(__file__).parents[1] / "configs"

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: more threads would only get in each other's way
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PretrainConfig]:
    """`tiny_config(folder, "key=value", …)`: configs/tiny.yaml with an output folder; prepared data is shared."""
    cache = tmp_path_factory.mktemp("cache")

    def make(folder: Path, *overrides: str) -> PretrainConfig:
        places = [f"output_dir={folder}", f"data.cache_dir={cache}"]
        return load_config(PretrainConfig, CONFIGS / "tiny.yaml", [*places, *overrides])

    return make


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Any]) -> Path:
    """The folder of a finished run of configs/tiny.yaml."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert conclude(pretrain(tiny_config(folder)), folder) == 0
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What needs a GPU is skipped where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is promised to the bit holds on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
