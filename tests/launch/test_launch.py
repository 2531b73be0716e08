"""The launcher on a toy script: what its exit codes mean, when it gives up, and that nothing stays behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mai_thinking.launch.goodput import account_of
from mai_thinking.training.checkpoint_storage import read_manifest
from mai_thinking.training.metrics import read_records

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "scripts" / "launch.py"


def start(folder: Path, *toy: str, options: tuple[str, ...] = ("--nproc=2",)) -> "subprocess.Popen[str]":
    command = [sys.executable, str(LAUNCH), *options, str(HERE / "toy_run.py"), str(folder), *toy]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)  # type: ignore[call-overload]


def workers_in(output: str) -> list[int]:
    return [int(line.rsplit(" ", 1)[1]) for line in output.splitlines() if "toy: " in line and "process" in line]


def assert_gone(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_it_runs_to_the_end(tmp_path: Path) -> None:
    output, _ = (process := start(tmp_path)).communicate(timeout=120)
    assert process.returncode == 0, output
    assert "toy: 0 of 2" in output
    assert "[rank 1] toy: 1 of 2" in output
    assert_gone(workers_in(output))


@pytest.mark.parametrize("nodes", [1, 2])
def test_under_torchrun_the_ranks_find_each_other(nodes: int, tmp_path: Path) -> None:
    """Without our launcher, as on several machines: two ranks of one, or one each of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = [f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    script = ["scripts/pretrain.py", "configs/tiny.yaml", f"output_dir={tmp_path / 'run'}"]
    script += ["steps=4", "schedule.warmup_steps=1"]
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *place, f"--node-rank={node}", *script],
            cwd=HERE.parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(nodes)
    ]  # fmt: skip
    for launcher in launchers:
        output, _ = launcher.communicate(timeout=200)
        assert launcher.returncode == 0, output
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-00000004")
    assert read_manifest(newest)["world_size"] == 2
    steps = [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl") if "kind" not in record]
    assert steps == [1, 2, 3, 4]


def test_a_crash_loop_ends_with_the_first_traceback(tmp_path: Path) -> None:
    options = ("--nproc=2", "--fruitless-restarts=1")
    output, _ = (process := start(tmp_path, "crash=3", options=options)).communicate(timeout=120)
    assert process.returncode == 1, output
    assert "giving up: 2 restarts in a row reached no new step" in output
    # Not at each failure, and at the end once more.
    assert 1 <= output.count("ValueError: crash asked for at step 3\n") <= output.count("; restarting from") + 1
    assert_gone(workers_in(output))


def test_refused_input_is_not_tried_again(tmp_path: Path) -> None:
    output, _ = (process := start(tmp_path, "refuse=yes")).communicate(timeout=120)
    assert process.returncode == 2, output
    assert "error: the config is refused" in output
    assert "restarting" not in output
    assert "Traceback" not in output


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_stopping_saves_and_leaves_nobody(tmp_path: Path, name: signal.Signals) -> None:
    process = start(tmp_path, "steps=100000", "every=1000")
    deadline = time.monotonic() + 60
    while len(read_records(tmp_path / "metrics.jsonl")) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(name)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    last = read_records(tmp_path / "metrics.jsonl")[-1]["step"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert_gone(workers_in(output))


def test_chaos_is_survived_and_accounted_for(tmp_path: Path) -> None:
    # On a busy machine several kills may strike in a row before there is a new step.
    options = ("--nproc=2", "--chaos=kill:2s", "--restarts=100", "--fruitless-restarts=100")
    output, _ = (process := start(tmp_path, "steps=100", "sleep=0.03", options=options)).communicate(timeout=200)
    assert process.returncode == 0, output
    steps = [record["step"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, 101))
    result = account_of(tmp_path)
    strikes = output.count("chaos: kill number")
    assert 1 <= len(result.recoveries) <= strikes
    assert sum(result.seconds.values()) == pytest.approx(result.segments[-1][2] - result.begin, rel=0.01)
