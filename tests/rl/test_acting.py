"""An RL run with tools, from a tiny base that writes calls: in one process and with workers, and with a worker that
dies in mid-call."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checksums import sha256_of
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.recipes.grpo import grpo
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.report import conclude
from mai_thinking.report.thinking import write_acting
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model

ROOT = Path(__file__).parents[2]
Make = Callable[..., GrpoConfig]

SERVER = """
import os, pathlib, signal, sys
from mcp.server.mcpserver import MCPServer

server, log = MCPServer("server"), pathlib.Path(sys.argv[1])

@server.tool()
def lookup(name: str) -> str:
    with log.open("a") as file:
        file.write(name + "\\n")
    struck = log.with_suffix(".struck")
    if os.getppid() != int(sys.argv[2]) and not struck.exists():  # not the trainer, which evaluates
        struck.touch()
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(1)
    return "end" if name.isupper() else name.upper()

server.run()
"""


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Any]) -> Make:
    """`make(folder, "key=value", …)`: an RL run on maps, from a base that has read how they are asked."""
    folder = tmp_path_factory.mktemp("acting")
    source = {
        "name": "map", "kind": "embedded", "path": "serial", "category": "maths", "licence": "MIT", "weight": 1,
        "provenance": "procedural", "max_bytes": 100_000, "serial": {"families": ["map"], "sizes": [1, 1]},
    }  # fmt: skip
    settings = (
        "steps=60", "optimizer.learning_rate=1.5e-2", "evaluation.every=60", "checkpoint.every=60",
        f"data.sources={json.dumps([source])}",
        "data.cleaning.quality.min_bytes=24", "data.cleaning.quality.min_alphabetic=0.1",
    )  # fmt: skip
    assert conclude(pretrain(tiny_config(folder / "base", *settings)), folder / "base") == 0
    task = {"name": "map", "kind": "map", "length": [1, 1], "graders": [{"pattern": "[a-mA-M].*", "passes": True}],
            "combination": "sum"}  # fmt: skip

    def config(run: Path, *overrides: str) -> GrpoConfig:
        own = (
            f"output_dir={run}", f"init_from={folder / 'base' / 'final'}", f"tasks={json.dumps([task])}", "steps=2",
            'template={"preset": "exercise"}', 'tools.use=["lookup"]', "rollouts.steps_per_update=1",
            "curriculum.start=40", "curriculum.end=40", "packing.row_length=128", "collapse.enabled=false",
            "reward.w_calls=0.1", "reward.w_waste=0.1",
        )  # fmt: skip
        return load_config(GrpoConfig, ROOT / "configs" / "tiny-grpo.yaml", [*own, *overrides])

    return config


def test_with_workers_it_is_the_run_of_one_process(make: Make, tmp_path: Path) -> None:
    runs = {}
    for name, workers in (("alone", 0), ("workers", 1)):
        config = make(tmp_path / name, "rollouts.max_staleness=0", f"rollouts.workers={workers}")
        assert conclude(grpo(config), tmp_path / name) == 0
        traces = TraceStore(tmp_path / name / FOLDER).read().to_pylist()
        runs[name] = traces, sha256_of(load_model(tmp_path / name / "final").state_dict())
    assert runs["alone"] == runs["workers"]
    acted = [trace for trace in runs["alone"][0] if trace["observed"]]
    assert len(acted) > 20
    for trace in acted:
        own, result, *_ = json.loads(trace["parts"])
        assert own.rpartition("Call: ")[1]
        assert result.startswith("Result: ")
        assert not any(p for p, seen in zip(trace["logprobs"], trace["observed"], strict=True) if seen)
    steps = [record for record in read_records(tmp_path / "alone" / "metrics.jsonl") if "cache_hits" in record]
    assert len(steps) == 2
    assert all(0.5 < record["cache_hits"] < 1 and record["calls"] > 0 for record in steps)
    page = (tmp_path / "alone" / "report" / "summary.md").read_text()
    assert "Result: " in page
    write_acting([tmp_path / "alone"], tmp_path / "page", ["map"])
    (seed,) = json.loads((tmp_path / "page" / "summary.json").read_text())["seeds"]
    assert 0 < seed["calls_needed"] <= 1
    assert seed["before"] >= 0


def test_a_worker_that_dies_in_mid_call_loses_nothing_and_calls_nothing_twice(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("mcp")
    (tmp_path / "server.py").write_text(SERVER)
    command = [sys.executable, str(tmp_path / "server.py"), str(tmp_path / "calls.log"), str(os.getpid())]
    config = make(
        tmp_path / "run", "tools.use=[]", f"tools.servers={json.dumps({'maps': command})}", "rollouts.workers=1",
        "rollouts.max_staleness=0",
    )  # fmt: skip
    assert grpo(config) == 0
    assert (tmp_path / "calls.struck").exists()
    made = (tmp_path / "calls.log").read_text().splitlines()
    journal = list((tmp_path / "run" / "calls").glob("*.json"))
    unknown = sum(not path.read_text() for path in journal)
    assert unknown >= 1  # of those in mid-call nobody knows
    assert 5 < len(journal) - unknown <= len(made) <= len(journal)  # none twice
    stored = sorted(path.name for path in (tmp_path / "run" / FOLDER).glob("batch-*"))
    assert [int(name.split("-")[1]) for name in stored] == list(range(len(stored)))
    steps = [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert steps == [1, 2]
