"""The trace store: whole parts or none, each once; what readers see; `scripts/traces.py`."""

import contextlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mai_thinking.errors import UsageError
from mai_thinking.rl.trace_report import choose, report_traces, show
from mai_thinking.rl.traces import SCHEMA, Trace, TraceStore
from mai_thinking.training.metrics import NotReproducedError
from ranks import CONTEXT

ROOT = Path(__file__).parents[2]


def trace(number: int, *, step: int = 0, task: str = "sums", **changes: object) -> Trace:
    length = 1 + number % 5
    plain = Trace(
        step=step,
        engine_version=step // 5,
        request_id=number,
        group_id=number // 4,
        task=task,
        problem_id=f"p{number // 4}",
        prompt="User: 1+1=? Assistant: <think>",
        prompt_ids=[5, 6, 7],
        response="é" * (number % 50),
        response_ids=np.arange(length),
        logprobs=np.linspace(-1, -0.1, length),
        finished=number % 2 == 0,
        answer=None if number % 3 == 0 else str(number),
        reference="2",
        passed=number % 2 == 1,
        reward=number / 7,
        reward_task=float(number % 2),
        reward_language=0.5,
        reward_length=0.125,
        observed=np.arange(length) % 2 == 1 if number == 3 else np.empty(0, dtype=bool),
        parts=json.dumps(["Call: x", "\x1b[2J", "y"]) if number == 3 else None,
        reward_calls=0.0,
        reward_waste=0.0,
        pass_rate=0.5,
        verdict="kept",
        checkpoint="nano-grpo/step-00000000",
        lineage="runs/nano/final",
    )
    return plain | changes


def test_what_goes_in_comes_out(tmp_path):
    traces = [trace(number) for number in range(6)]
    assert TraceStore(tmp_path).append(0, traces)
    table = TraceStore(tmp_path).read()
    assert table.schema == SCHEMA
    assert set(SCHEMA.names) == set(traces[0])
    for row, given in zip(table.to_pylist(), traces, strict=True):
        for name, value in row.items():
            expected = given[name]
            if name == "logprobs":
                expected = expected.astype(np.float32)
            assert value == (expected.tolist() if isinstance(expected, np.ndarray) else expected), name


def test_rows_come_by_batch_and_rank_and_are_chosen_by_step_task_and_column(tmp_path):
    for batch in (100_000_000, 2, 99_999_999):  # as text, the first name sorts before the last
        for rank in (1, 0):
            rows = [trace(batch * 10 + rank, step=batch, task=task) for task in ("sums", "sorting")]
            TraceStore(tmp_path, rank).append(batch, rows)
    (tmp_path / "notes.txt").write_text("not a part")
    store = TraceStore(tmp_path)
    order = store.read([("task", "==", "sums")], ["request_id"])["request_id"].to_pylist()
    assert order == [20, 21, 999_999_990, 999_999_991, 1_000_000_000, 1_000_000_001]
    chosen = store.read([("step", ">", 2), ("task", "==", "sorting")], ["task", "step"])
    assert chosen.to_pydict() == {"task": ["sorting"] * 4, "step": [99_999_999] * 2 + [100_000_000] * 2}
    assert store.read([("step", "in", {7})], ["reward"]) == pa.table({"reward": pa.array([], pa.float64())})
    assert [len(part) for part in store.parts([("step", "in", {99_999_999})])] == [2, 2]


def test_a_part_written_without_a_term_of_the_reward_has_null_for_it(tmp_path):
    store = TraceStore(tmp_path)
    store.append(0, [trace(number) for number in range(4)])
    (part,) = tmp_path.iterdir()
    pq.write_table(pq.read_table(part).drop_columns(["reward_length"]), part)
    table = store.read()
    assert table.schema == SCHEMA
    assert table["reward_length"].null_count == 4
    assert store.read(columns=["reward_length"]).column_names == ["reward_length"]


def test_an_empty_batch_and_an_empty_response_are_stored_too(tmp_path):
    store = TraceStore(tmp_path)
    assert store.append(0, [])
    assert not store.append(0, [])
    assert store.read().num_rows == 0
    store.append(1, [trace(0, response_ids=[], logprobs=[])])
    assert store.read().to_pylist()[0]["response_ids"] == []


def test_a_batch_generated_again_is_compared_and_not_written_twice(tmp_path):
    store = TraceStore(tmp_path)
    traces = [trace(number, step=3) for number in range(4)]
    traces[0] = traces[0] | {"reward": float("nan")}  # equals itself, bit for bit
    assert store.append(7, traces)
    (part,) = tmp_path.iterdir()
    before = part.stat()
    assert not TraceStore(tmp_path).append(7, traces)
    assert part.stat().st_mtime_ns == before.st_mtime_ns
    assert part.stat().st_ino == before.st_ino
    assert TraceStore(tmp_path, rank=1).append(7, traces)  # another rank's part is another part
    assert store.read().num_rows == 8


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    "change",
    [
        {"logprobs": np.nextafter(np.linspace(-1, -0.1, 2).astype(np.float32), np.float32(0))},
        {"response_ids": [0]},
        {"response": "éé"},
        {"answer": ""},
        {"reward_task": -0.0},
        {"finished": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_one_different_value_is_named(tmp_path, change):
    store = TraceStore(tmp_path)
    plain = trace(1, step=3, answer=None, reward_task=0.0)
    store.append(7, [plain])
    pattern = rf"^step 3, batch 7 of rank 0, .* other values of {next(iter(change))} than "
    with pytest.raises(NotReproducedError, match=pattern):
        store.append(7, [plain | change])
    assert store.read().num_rows == 1


@pytest.mark.usefixtures("no_gpu")
def test_the_same_bytes_cut_elsewhere_are_different(tmp_path):
    store = TraceStore(tmp_path)
    store.append(0, [trace(1, response="ab", response_ids=[1, 2]), trace(2, response="c", response_ids=[3])])
    with pytest.raises(NotReproducedError, match="other values of response, response_ids than"):
        store.append(0, [trace(1, response="a", response_ids=[1]), trace(2, response="bc", response_ids=[2, 3])])


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "foreign"])
def test_a_damaged_part_is_named_left_out_and_written_again(tmp_path, capsys, damage):
    # Random numbers do not compress: a bit of them can change without the decompressor's noticing.
    noise = np.random.default_rng(0).random(2000)
    batches = [
        [trace(n, step=batch, response_ids=range(2000), logprobs=noise) for n in range(20)] for batch in range(3)
    ]
    store = TraceStore(tmp_path)
    for batch, traces in enumerate(batches):
        store.append(batch, traces)
    part = tmp_path / "batch-00000001-rank-00000.parquet"
    content = bytearray(part.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    kept = {"cut": len(content) // 2, "emptied": 0}.get(damage, len(content))
    part.write_bytes(content[:kept])
    if damage == "foreign":
        pq.write_table(pa.table({"x": [1]}), part)
    assert store.read()["step"].unique().to_pylist() == [0, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{part}: damaged (")
    assert line.endswith("; left out")
    assert store.append(1, batches[1])
    assert "written again" in capsys.readouterr().err
    assert store.read().num_rows == 60


def test_a_full_disk_leaves_nothing(tmp_path):
    store = TraceStore(tmp_path)
    store.append(0, [trace(1)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Not a full disk, but as far as the file goes just the same: a part of it is written, then no more.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="batch-00000001") as caught:
            store.append(1, [trace(1, response_ids=np.random.default_rng(0).integers(0, 2**31, 5000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "batch-00000001-rank-00000.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["batch-00000000-rank-00000.parquet"]
    assert store.append(1, [trace(1)])


def write_on(folder: Path, sending: Connection | None = None) -> None:
    """Batch after batch; each one's number is sent when `append` has returned."""
    store = TraceStore(folder)
    for batch in range(100_000):
        store.append(batch, [trace(number, step=batch) for number in range(50)])
        if sending:
            sending.send(batch)


def write_until_the_disk_is_asked(folder: Path) -> None:
    os.fsync = lambda file: (os.ftruncate(file, 500), os.kill(os.getpid(), signal.SIGKILL))
    write_on(folder)


def test_kill_leaves_whole_parts_and_the_run_goes_on(tmp_path, capsys):
    delays, reported = random.Random(0), -1
    for _ in range(4):
        receiving, sending = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=write_on, args=(tmp_path, sending), daemon=True)
        process.start()
        sending.close()
        before = reported
        while reported < before + 2:  # on a machine however busy
            assert receiving.poll(60)
            reported = max(reported, receiving.recv())
        time.sleep(delays.uniform(0, 0.2))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                reported = max(reported, receiving.recv())
        table = TraceStore(tmp_path).read(columns=["step"])
        batches, counts = np.unique(table["step"].to_numpy(), return_counts=True)
        assert capsys.readouterr().err == ""
        assert list(batches) == list(range(len(batches)))
        assert set(counts) == {50}
        assert len(batches) > reported  # what append has returned from is there
    assert reported > 3


def test_killed_before_the_bytes_are_on_the_disk(tmp_path, capsys):
    process = CONTEXT.Process(target=write_until_the_disk_is_asked, args=(tmp_path,), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    store = TraceStore(tmp_path)
    assert store.read().num_rows == 0
    assert store.append(0, [trace(1)])
    assert [path.suffix for path in tmp_path.iterdir()] == [".parquet"]
    assert capsys.readouterr().err == ""


def test_best_worst_longest_newest(tmp_path):
    store = TraceStore(tmp_path)
    for batch in range(3):
        store.append(
            batch, [trace(batch * 4 + number, step=batch, task=("sums", "sorting")[number % 2]) for number in range(4)]
        )
    store.append(3, [trace(99, step=3, reward=11 / 7)])

    def ids(*arguments, **chosen):
        return [row["request_id"] for row in choose(store, *arguments, **chosen)]

    assert ids("best", 3) == [11, 99, 10]  # of two equals the older first
    assert ids("worst", 3) == [0, 1, 2]
    assert ids("longest", 3) == [4, 9, 99]  # 5 tokens each
    assert ids("newest", 3) == [10, 11, 99]
    assert ids("newest", 99) == [*range(12), 99]
    assert ids("best", 9, step=1, task="sums") == [6, 4]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"step": 7}, "at step 7, but from 0 to 9; take 9"),
        ({"step": 8, "task": "sorting"}, "of task 'sorting' at step 8, but from 0 to 0; take 0"),
        ({"task": "sum"}, "no traces of task 'sum'; did you mean 'sums'"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, chosen, message):
    store = TraceStore(tmp_path)
    store.append(0, [trace(1, step=0), trace(2, step=0, task="sorting"), trace(3, step=9)])
    with pytest.raises(UsageError, match=message):
        choose(store, "best", 1, **chosen)


def test_a_model_cannot_steer_the_terminal(tmp_path):
    hostile = "[red]\x1b]0;title\x07\x1b[2J\u202e\r[/nothing]\nnext"
    TraceStore(tmp_path / "traces").append(0, [trace(1, response=hostile, answer=hostile, prompt=hostile)])
    written = io.StringIO()
    report_traces(tmp_path, "best", 1, Console(file=written, width=200), step=None, task=None)
    text = written.getvalue()
    assert not any(c in text for c in "\x1b\x07\r\u202e")
    assert r"[red]\x1b]0;title\x07\x1b[2J\u202e\r[/nothing]" in text
    assert "\nnext" in text


def test_a_rollout_is_shown_with_its_parts():
    written = io.StringIO()
    row = trace(4, step=12, reward_task=1.0)
    show(row | {"logprobs": row["logprobs"].tolist()}, Console(file=written, width=200))
    text = written.getvalue()
    for shown in (
        "step 12 · sums · reward 0.571",
        "task 1.000 · language 0.500 · length 0.125 · calls 0.000 · waste 0.000 · pass rate 0.50 · group kept",
        "5 tokens, finished · 0.550 nats per token",
        "User: 1+1=? Assistant: <think>éééé",
        "answer '4', reference '2'",
        "nano-grpo/step-00000000",
    ):
        assert shown in text


def test_the_steps_of_a_rollout_are_told_apart():
    """What a tool wrote is shown in another colour, and steers the terminal no more than what a model wrote."""
    written = io.StringIO()
    row = trace(3)
    show(row | {"logprobs": row["logprobs"].tolist()}, Console(file=written, width=200, force_terminal=True))
    text = written.getvalue()
    assert "Call: x" in text
    assert "\x1b[33m\\x1b[2J\x1b[0m" in text


def script(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "traces.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_script(tmp_path):
    TraceStore(tmp_path / "run" / "traces").append(0, [trace(number, step=5) for number in range(9)])
    shown = script(tmp_path / "run", "--step", 5, "--worst", 2)
    assert shown.returncode == 0
    assert shown.stdout.count("step 5 · sums") == 2
    assert "reward 0.143" in shown.stdout
    failed = script(tmp_path / "nowhere")
    assert failed.returncode == 2
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/nowhere: there is no such run")


@pytest.mark.parametrize(("count", "message"), [(0, "at least 1"), (1, "holds no traces")])
def test_a_run_without_traces_and_a_count_without_sense(tmp_path, count, message):
    with pytest.raises(UsageError, match=message):
        report_traces(tmp_path, "best", count, Console(), step=None, task=None)


def test_what_an_earlier_version_wrote_is_filled_up_or_left_out(tmp_path, capsys):
    """A part of the reward that there was not is null; without the graders' verdict nobody knows what was right."""
    store = TraceStore(tmp_path)
    store.append(0, [trace(number) for number in range(4)])
    (part,) = tmp_path.iterdir()
    old = pq.read_table(part)
    pq.write_table(old.drop_columns(["reward_length"]).replace_schema_metadata(old.schema.metadata), part)
    table = store.read()
    assert table.schema == SCHEMA
    assert table["reward_length"].null_count == 4
    assert store.read(columns=["passed"]).column_names == ["passed"]
    assert not store.append(0, [trace(number) for number in range(4)])  # a run of before goes on
    pq.write_table(old.drop_columns(["passed"]), part)
    assert store.read().num_rows == 0
    assert "of an earlier version); left out" in capsys.readouterr().err
