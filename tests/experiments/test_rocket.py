"""The proof's own arithmetic, and the page that is drawn from its parts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from mai_thinking.config.grpo import GrpoConfig, ObjectiveSection
from mai_thinking.config.loading import load_config
from mai_thinking.errors import UsageError
from mai_thinking.experiments.pacing import shares_by_size
from mai_thinking.experiments.without import PARTS, main
from mai_thinking.report.rocket import draw, write_part
from mai_thinking.rl import policy
from mai_thinking.rl.asynchronous import Ahead
from mai_thinking.rl.tasks import TaskSampler

ROOT = Path(__file__).parents[2]


def test_which_groups_were_learned_from(tmp_path: Path) -> None:
    """Two groups an update. Of the first batch one waits for an update, and two more; of those that came late with
    weights 0 none is young enough by then, and a batch that is too old on arrival counts for nothing."""
    config = load_config(GrpoConfig, ROOT / "configs" / "tiny-grpo.yaml", ["rollouts.steps_per_update=1"])
    (tmp_path / "traces").mkdir()
    (tmp_path / "rollouts").mkdir()
    lines = []
    # number, arrival, weights, groups kept; group 9 is not.
    for number, version, wrote, groups in [(0, 0, 0, (0, 1, 2, 3, 4)), (1, 2, 0, (5,)), (2, 2, 2, (6, 7, 8))]:
        ids = [group for group in (*groups, 9) for _ in range(2)]
        table = {
            "group_id": ids,
            "verdict": ["kept" if group != 9 else "too_easy" for group in ids],
            "response_ids": [[1] * (group + 1) for group in ids],
        }
        parquet.write_table(pa.table(table), tmp_path / "traces" / f"batch-{number:08d}-rank-00000.parquet")
        lines.append({"version": version, "arrived": number, "weights": [[0, wrote]]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "rollouts" / "schedule-00000.jsonl").write_text(text)
    mix = TaskSampler(config.tasks, config.seed)
    sizes = [mix.problem("train", group).size for group in range(9)]
    # Update 0 learns from 0 and 1, update 1 from 2 and 3; 4 and 5 are too old; update 2 learns from 6 and 7; 8 waits.
    learned, decided = {0, 1, 2, 3, 6, 7}, set(range(8))
    rows = {row["size"]: row for row in shares_by_size(tmp_path, config, 1)}
    assert rows.keys() == set(sizes[:8])
    for size, row in rows.items():
        mine = [group for group in decided if sizes[group] == size]
        assert row["groups"] == len(mine)
        assert row["learned"] == pytest.approx(sum(group in learned for group in mine) / len(mine))
        assert row["response_length"] == pytest.approx(sum(group + 1 for group in mine) / len(mine))


def test_the_page_joins_what_the_parts_left(tmp_path: Path) -> None:
    write_part(tmp_path, "exact", {"staleness_0_differences": {"2": 0}}, "first", ["a" * 40], 0, None)
    write_part(tmp_path, "exact", {"staleness_0_differences": {"1": 3}}, "second", ["b" * 40], 0, None)
    write_part(
        tmp_path, "jit", {"jit": [{"just_in_time": "after", "recovery_seconds": 2.5}]}, "third", ["c" * 40], 7, None
    )
    draw(tmp_path)
    summary, page = json.loads((tmp_path / "summary.json").read_text()), (tmp_path / "summary.md").read_text()
    assert summary["staleness_0_differences"] == {"2": 0, "1": 3}
    assert summary["jit"] == [{"just_in_time": "after", "recovery_seconds": 2.5}]
    assert summary["made"]["jit"]["seed"] == 7
    assert "| staleness_0_differences | 2: 0, 1: 3 |" in page
    assert "| after | 2.500 |" in page
    assert "`second`; code bbbbbbb;" in page


def test_what_is_taken_out_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = torch.full((1, 3), -1.0, requires_grad=True), torch.full((1, 3), -4.0)
    arguments = (new, old, torch.ones(1, 3), torch.ones(1, 3))
    settings = ObjectiveSection().loss_settings | {"token_count": 3, "clip_relaxation": 0.0}
    assert policy.grpo_loss(*arguments, **settings)[1]["ratio_max"] == pytest.approx(torch.e**3)
    with patch(*PARTS["ratio"]):
        loss, statistics = policy.grpo_loss(*arguments, **settings)
    assert statistics["ratio_max"] == 1
    loss.backward()
    assert new.grad is not None
    assert new.grad.tolist() == [pytest.approx([-1 / 3] * 3)]
    ahead = Ahead.__new__(Ahead)
    ahead.per_update, ahead.max_staleness = 4, 1
    assert [ahead.in_time(groups) for groups in (8, 9)] == [True, False]
    with patch(*PARTS["pacing"]):
        assert ahead.in_time(9)
    monkeypatch.setattr(sys, "argv", ["without", "brakes", "scripts/grpo.py"])
    with pytest.raises(UsageError, match="name a part and a script: pacing, ratio"):
        main()


def prove(tiny_run: Path, folder: Path, *parts: str) -> dict[str, Any]:
    """The page's numbers, of a tiny climb."""
    command = ["configs/tiny-grpo.yaml", f"init_from={tiny_run / 'final'}", "rollouts.steps_per_update=1"]
    sizes = ["--workers", "1", "--updates", "8", "--kills", "4", "--blocks", "1", "--max-staleness", "2"]
    folders = ["--out", str(folder / "out"), "--work", str(folder / "runs")]
    script = [sys.executable, "scripts/rocket.py", *command, *folders, "--parts", *parts, *sizes]
    ended = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    return found


@pytest.mark.slow
def test_parts_of_a_tiny_climb(tiny_run: Path, tmp_path: Path) -> None:
    summary = prove(tiny_run, tmp_path, "exact", "shares", "deaths")
    assert summary["staleness_0_differences"] == {"1": 0}
    assert 1 <= summary["deaths"] <= 2
    assert 0 < summary["updates_under_deaths"] < 2
    assert sum(row["groups pacing"] for row in summary["learned_by_size"]) > 0


@pytest.mark.slow
def test_nothing_is_lost_where_processes_are_killed(tiny_run: Path, tmp_path: Path) -> None:
    summary = prove(tiny_run, tmp_path, "faults")
    assert sum(summary["kills"].values()) >= 2
    assert (summary["rollouts_lost"], summary["batches_learned_twice"], summary["replay_differences"]) == (0, 0, 0)
