"""Rollout workers on configs/tiny-grpo.yaml: the climb of one process where nothing may be stale, the same climb again
by its schedule where it may, and nothing lost when something dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checksums import sha256_of
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config, save_config
from mai_thinking.errors import UsageError
from mai_thinking.experiments.climb_run import climb_processes
from mai_thinking.recipes.grpo import grpo
from mai_thinking.report.reading import Run
from mai_thinking.report.timeline import LEARN, WAIT, timeline
from mai_thinking.rl.schedule import Schedule, schedule_path
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model
from mai_thinking.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
EXACT = ("step", "loss", "grad_norm", "reward", "pass@1", "clip_relaxation", "max_length")
Make = Callable[..., GrpoConfig]


@pytest.fixture(scope="module")
def make(tiny_run: Path) -> Make:
    """`make(folder, "key=value", …)`: configs/tiny-grpo.yaml, with updates of two steps."""

    def config(folder: Path, *overrides: str) -> GrpoConfig:
        settings = [
            f"output_dir={folder}",
            f"init_from={tiny_run / 'final'}",
            "rollouts.steps_per_update=2",
            *overrides,
        ]
        return load_config(GrpoConfig, ROOT / "configs" / "tiny-grpo.yaml", settings)

    return config


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on who generated."""
    traces = TraceStore(folder / FOLDER).read().to_pylist()
    return {
        "metrics": [{name: r[name] for name in EXACT if name in r} for r in read_records(folder / "metrics.jsonl")],
        "traces": sorted(traces, key=lambda trace: trace["request_id"]),
        "final": sha256_of(load_model(folder / "final").state_dict()),
    }


def is_whole(folder: Path) -> bool:
    """Whether each batch that was taken in is there once, with all that it began with."""
    arrived = [arrival["arrived"] for arrival in Schedule(schedule_path(folder, 0)).arrivals]
    stored = sorted(int(path.name.split("-")[1]) for path in (folder / FOLDER).glob("batch-*"))
    return len(set(arrived)) == len(arrived) and stored == sorted(arrived)


def test_nothing_stale_is_the_climb_of_one_process(make: Make, tmp_path: Path) -> None:
    """Two workers, of which one is always ahead of what is wanted and gives up."""
    for name, workers in (("alone", 0), ("workers", 2)):
        assert grpo(make(tmp_path / name, "rollouts.max_staleness=0", f"rollouts.workers={workers}")) == 0
    assert outcome(tmp_path / "workers") == outcome(tmp_path / "alone")
    assert not list((tmp_path / "workers" / "rollouts").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_fifty_updates_with_nothing_stale(make: Make, tmp_path: Path, workers: int) -> None:
    settings = ["rollouts.max_staleness=0", "steps=50", "rollouts.steps_per_update=1", "collapse.enabled=false"]
    for name, count in (("alone", 0), ("workers", workers)):
        assert grpo(make(tmp_path / name, *settings, f"rollouts.workers={count}")) == 0
    assert outcome(tmp_path / "workers") == outcome(tmp_path / "alone")


class Job:
    """scripts/grpo.py in a process of its own."""

    def __init__(self, config: GrpoConfig, folder: Path) -> None:
        self.run, self.config = config.folder, folder / "config.yaml"
        save_config(config, self.config)
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "grpo.py"), str(self.config)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, output
        return output

    def wait_for(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while not any(r["step"] >= step for r in read_records(self.run / "metrics.jsonl") if "kind" not in r):
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """Process ids."""
        return climb_processes(self.process.pid)["worker"]

    def kill(self) -> None:
        """The trainer alone: its workers are to end by themselves."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()  # which a worker that is stopped still has


def assert_ends(worker: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline, "a worker outlives the trainer"
        time.sleep(0.05)


def assert_who_did_what(folder: Path, steps: list[dict[str, Any]]) -> None:
    """The records' idle shares, and the page's timeline of the last six of eight updates."""
    for record in steps:
        idle = record["rollout_seconds"] - record.get("generation_seconds", 0.0)
        # Of the step's time until its record is made, which is a little less than the whole.
        assert idle / record["seconds"] - 1e-6 <= record["idle/learner"] <= idle / record["seconds"] + 0.2
        assert ("idle/workers" in record) == (record["step"] % 2 == 1)
    assert any(0 < record["idle/workers"] < 1 for record in steps[::2])
    (figure,) = timeline(Run(folder))
    assert f"![timeline](timeline.png)\n\n{figure.caption}\n" in (folder / "report" / "summary.md").read_text()
    lanes = figure.panels[0].lanes
    assert list(lanes)[:3] == ["learner", "worker 0", "worker 1"]
    assert list(lanes)[-1] == "graders"
    assert {*lanes} - {"learner", "worker 0", "worker 1", "graders"} <= {"worker 2", "learner, in waiting"}
    spent = {name: sum(seconds for _, seconds in stretches) for name, stretches in lanes["learner"].items()}
    waited = sum(record["rollout_seconds"] for record in steps[4:])
    assert spent[WAIT] == pytest.approx(waited, abs=1e-3)
    assert spent[LEARN] == pytest.approx(sum(record["seconds"] for record in steps[4:]) - waited, abs=1e-3)
    ends = [begin + seconds for stretches in lanes["learner"].values() for begin, seconds in stretches]
    arrivals = [one for one in read_records(schedule_path(folder, 0)) if one.get("version", 0) >= 6 and "began" in one]
    for number in (0, 1):
        shown = sorted((begin, name) for name, spans in lanes[f"worker {number}"].items() for begin, _ in spans)
        mine = sorted((one["began"], one["weights"][0][1]) for one in arrivals if one["worker"] == number)
        last = [f"weights {version}" for _, version in mine]
        assert [name for _, name in shown][-len(last) or len(shown) :] == last
        assert all(0 <= begin < max(ends) for begin, _ in shown)


def test_killed_and_replayed_it_is_the_same_climb(make: Make, tmp_path: Path) -> None:
    """Workers ahead of the learner: one is killed; one is stopped, and the trainer is killed. Then the climb goes on
    with what had arrived and one worker more, beside the one that was stopped, which wakes up and may not answer any
    more; and its schedule, done again in one process, gives the same weights."""
    settings = ["rollouts.max_staleness=3", "steps=16", "checkpoint.every=6", "evaluation.every=8"]
    job = Job(make(tmp_path / "run", *settings, "rollouts.workers=2"), tmp_path)
    job.wait_for(2)
    os.kill(job.workers()[0], signal.SIGKILL)
    job.wait_for(9)
    stopped, other = job.workers()
    os.kill(stopped, signal.SIGSTOP)
    job.kill()
    assert_ends(other)
    save_config(make(tmp_path / "run", *settings, "rollouts.workers=3"), job.config)
    job.start()
    job.wait_for(10)
    assert Path(f"/proc/{stopped}").exists()
    os.kill(stopped, signal.SIGCONT)
    assert_ends(stopped)
    job.finish()
    assert is_whole(tmp_path / "run")
    steps = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if "kind" not in record]
    assert [record["step"] for record in steps] == list(range(1, 17))
    assert 0 < max(record["staleness"] for record in steps) <= 3
    assert_who_did_what(tmp_path / "run", steps)
    assert grpo(make(tmp_path / "again", *settings, f"rollouts.replay={tmp_path / 'run'}")) == 0
    assert outcome(tmp_path / "again") == outcome(tmp_path / "run")


def test_a_replay_needs_a_schedule(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rollouts\.replay: .* does not exist; name the folder"):
        grpo(make(tmp_path / "again", f"rollouts.replay={tmp_path / 'nowhere'}"))
    with pytest.raises(UsageError, match="leave one of them"):
        make(tmp_path / "both", "rollouts.workers=1", "rollouts.lead=1")


def test_a_run_may_go_on_with_another_cluster_or_none(make: Make, tmp_path: Path) -> None:
    """A cluster that is started again has another address; that there are workers at all may not change."""
    folder = tmp_path / "run"
    folder.mkdir()
    before = make(folder, "rollouts.workers=2", "rollouts.ray=10.0.0.1:6379")
    save_config(before, folder / "config.yaml")
    for ray in ("10.0.0.2:6379", "null"):
        assert RunFolder(folder).changed_keys(make(folder, "rollouts.workers=3", f"rollouts.ray={ray}")) == []
    assert RunFolder(folder).changed_keys(make(folder, "rollouts.workers=0")) == ["rollouts.workers"]
