"""Two gloo workers on the real script: whatever strikes them, the run ends as the undisturbed one did, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from checksums import sha256_of
from mai_thinking.config.loading import load_config, save_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.launch.goodput import account_of
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.checkpoint import CheckpointReader
from mai_thinking.training.metrics import read_records
from mai_thinking.training.trainer import Trainer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS, EVERY = 24, 4
Fault = dict[str, Any]


def fault(step: int, place: str, rank: int, how: str = "kill") -> Fault:
    return {"step": step, "place": place, "rank": rank, "how": how}


class Job:
    """A run of configs/tiny.yaml under the launcher, in a folder of its own."""

    def __init__(self, folder: Path, make: Callable[..., Any], *overrides: str):
        folder.mkdir(parents=True)
        self.run = folder / "run"
        self.config = folder / "config.yaml"
        settings = [f"steps={STEPS}", f"checkpoint.every={EVERY}", "batch.micro_batch_size=2", "evaluation.every=6"]
        more = ["tracking.documents=true", "evaluation.sample_prompts=[]", "evaluation.max_bytes=1000"]
        save_config(make(self.run, *settings, *more, *overrides), self.config)

    def start(
        self,
        faults: Sequence[Fault] = (),
        hang_seconds: float = 60,
        nproc: int = 2,
        jit_seconds: float = 60,
    ) -> "subprocess.Popen[str]":
        options = [f"--nproc={nproc}", "--restarts=100", f"--hang-seconds={hang_seconds}"]
        options.append(f"--jit-seconds={jit_seconds}")
        command = [sys.executable, str(ROOT / "scripts" / "launch.py"), *options]
        return subprocess.Popen(
            [*command, str(HERE / "faulty_pretrain.py"), str(self.config)],
            env=os.environ | {"FAULTS": json.dumps(list(faults)), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, *arguments: Any, **keywords: Any) -> tuple[int, str]:
        process = self.start(*arguments, **keywords)
        output, _ = process.communicate(timeout=280)
        return process.returncode, output

    def wait_for(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while not any(record["step"] >= step for record in read_records(self.run / "metrics.jsonl")):
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.02)

    def trace(self, *, state: bool = True) -> dict[str, Any]:
        """All that must not depend on what happened on the way."""
        metrics = read_records(self.run / "metrics.jsonl")
        steps = [record for record in metrics if "kind" not in record]
        documents = sorted((self.run / "documents").glob("*.jsonl"))
        return {
            "losses": [(r["step"], r["loss"].hex(), r["grad_norm"].hex(), r["balance_loss"].hex()) for r in steps],
            "evaluations": [(r["step"], r["bits_per_byte"].hex()) for r in metrics if r.get("kind") == "evaluation"],
            "documents": {path.name: read_records(path) for path in documents},
            "state": self.state_hashes() if state else {},
        }

    def state_hashes(self) -> dict[str, str]:
        """SHA-256 of each part of the last checkpoint."""
        path = sorted((self.run / "checkpoints").glob("step-*"))[-1]
        reader = CheckpointReader(path)
        parts = {name: reader.read(name) for name in ("model", "optimizer", "loader", "progress")}
        parts |= {f"random-{rank}": reader.read("random", of_rank=rank) for rank in (0, 1)}
        return {name: sha256_of(part) for name, part in parts.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Any]) -> dict[str, Any]:
    job = Job(tmp_path_factory.mktemp("undisturbed") / "job", tiny_config)
    code, output = job.finish()
    assert code == 0, output
    trace = job.trace()
    assert len(trace["losses"]) == STEPS
    assert [step for step, _ in trace["evaluations"]] == [6, 12, 18, 24]
    assert [len(records) for records in trace["documents"].values()] == [STEPS, STEPS]
    return trace


def test_every_kind_of_fault(undisturbed: dict[str, Any], tmp_path: Path, tiny_config: Callable[..., Any]) -> None:
    """Killed between micro-batches, before an update, in mid-checkpoint; hung; and stopped by SIGTERM and started
    again. The rank that is left saves: nothing is computed twice."""
    job = Job(tmp_path / "job", tiny_config)
    faults = [
        fault(3, "between", 0),  # before there is a checkpoint
        fault(6, "update", 1),
        fault(8, "save", 1),
        fault(14, "update", 0),
        fault(17, "between", 1, "hang"),
    ]
    process = job.start(faults, hang_seconds=12)
    job.wait_for(18)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "no step for" in output
    code, output = job.finish()
    assert code == 0, output
    assert_survived(job, faults, undisturbed)
    assert account_of(job.run).recomputed_steps == 0


def test_where_no_rank_may_save_the_newest_whole_checkpoint_is_taken(
    undisturbed: dict[str, Any], tmp_path: Path, tiny_config: Callable[..., Any]
) -> None:
    """Steps wait for what is saved: no checkpoint is on its way that would be newer than the one that is torn. The
    rank that is left lacks the other's state, however long it lives."""
    job = Job(tmp_path / "job", tiny_config, "checkpoint.asynchronous=false")
    faults = [fault(3, "between", 0), fault(8, "save", 1), fault(14, "update", 0, "tear")]
    code, output = job.finish(faults, jit_seconds=0)
    assert code == 0, output
    assert "damaged" in output
    assert_survived(job, faults, undisturbed)
    assert account_of(job.run).recomputed_steps > 0


def assert_survived(job: Job, faults: Sequence[Fault], undisturbed: dict[str, Any]) -> None:
    """All struck, and the run is what it would have been."""
    struck = sorted(path.name for path in job.run.parent.glob("struck-*"))
    assert struck == [f"struck-{n}" for n in range(len(faults))]
    assert job.trace() == undisturbed
    account = account_of(job.run)
    assert len(account.recoveries) == len(faults)
    assert sum(account.seconds.values()) == pytest.approx(account.wall_clock)


def test_successors_wait_for_the_rank_that_saves(
    undisturbed: dict[str, Any], tmp_path: Path, tiny_config: Callable[..., Any]
) -> None:
    """Whichever it is. They start beside it, and are there long before a slow save is done."""
    job = Job(tmp_path / "job", tiny_config)
    slow = [fault(10, "save", 0, "dawdle"), fault(18, "save", 1, "dawdle")]
    code, output = job.finish([fault(11, "update", 1), fault(19, "update", 0), *slow])
    assert code == 0, output
    assert "going on after step 10" in output
    assert "going on after step 18" in output
    assert job.trace() == undisturbed
    account = account_of(job.run)
    assert account.rescued == 2
    assert account.recomputed_steps == 0
    assert min(account.recoveries) > 3


@pytest.mark.parametrize("omitted", ["", "random", "loader", "optimizer"])
def test_a_checkpoint_without_a_part_of_the_state_is_found_out(
    tmp_path: Path, tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, omitted: str
) -> None:
    """The negative control: what the tests above claim to see, they see. In this process, stopped after a step."""
    whole, struck = (Job(tmp_path / name, tiny_config, "steps=8") for name in ("whole", "struck"))
    state, take_step = Trainer.state, Trainer.take_step

    def with_signal(self: Trainer) -> None:
        if self.step + 1 == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(self)

    assert pretrain(load_config(PretrainConfig, whole.config)) == 0
    monkeypatch.setattr(Trainer, "state", lambda self: {k: v for k, v in state(self).items() if k != omitted})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", with_signal)
        assert pretrain(load_config(PretrainConfig, struck.config)) == 75
    assert pretrain(load_config(PretrainConfig, struck.config)) == 0
    assert (struck.trace(state=False) == whole.trace(state=False)) == (not omitted)


@pytest.mark.slow
@pytest.mark.parametrize("jit_seconds", [60, 0])
def test_25_random_kill_points(
    undisturbed: dict[str, Any], tmp_path: Path, tiny_config: Callable[..., Any], jit_seconds: float
) -> None:
    draw = random.Random(2024)
    places = [("between", step) for step in range(1, STEPS + 1)] + [("update", step) for step in range(1, STEPS + 1)]
    places += [("save", step) for step in range(EVERY, STEPS + 1, EVERY)]
    job = Job(tmp_path / "job", tiny_config)
    faults = [fault(step, place, draw.randrange(2)) for place, step in draw.sample(places, 25)]
    code, output = job.finish(faults, jit_seconds=jit_seconds)
    assert code == 0, output
    assert len(list(tmp_path.glob("job/struck-*"))) == 25, output
    assert job.trace() == undisturbed
