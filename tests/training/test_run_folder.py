"""A run's folder, as several ranks find it."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.errors import UsageError
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.run_folder import RunFolder


def test_a_rank_may_look_while_another_tries_whether_the_folder_can_be_made(
    tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 makes it and takes it away again."""
    config, done = tiny_config(tmp_path / "run"), threading.Event()

    def make_and_remove() -> None:
        while not done.is_set():
            (tmp_path / "run").mkdir()
            (tmp_path / "run").rmdir()

    monkeypatch.setenv("RANK", "1")
    thread = threading.Thread(target=make_and_remove)
    thread.start()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            RunFolder(tmp_path / "run").check(config)
    finally:
        done.set()
        thread.join()


def test_checkpoints_that_will_not_fit_are_refused_before_the_first(
    tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room._replace(free=2 * 3 * 4 * 104_000))
    with pytest.raises(UsageError, match=r"0.0 GB are free, and two checkpoints.*name another output_dir"):
        pretrain(tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
