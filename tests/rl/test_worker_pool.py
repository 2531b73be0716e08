"""The pool's part alone: workers that die, hang or come too late, played by a function that does just that."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch

from mai_thinking.errors import RunError
from mai_thinking.rl import worker_pool
from mai_thinking.rl.asynchronous import InTurn
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.rollout_worker import RolloutBatch
from mai_thinking.rl.schedule import Spool
from mai_thinking.rl.worker_pool import Worker, WorkerPool
from mai_thinking.rl.worker_process import SharedWeights, WorkerSetup


def faulty(setup: WorkerSetup, worker: int, connection: Connection) -> None:
    """Answers each batch, saying who made it, unless `config` has a fault for its number: `kill`,
    `stop` or `slow`, once; `always_dies`, every time; `fails`, which cannot be helped."""
    while True:
        try:
            batch = connection.recv()
        except (EOFError, OSError):
            return
        setup.beats[worker] = time.monotonic()
        fault = setup.config.get(str(batch.number), setup.config.get("every"))
        mark = Path(setup.config["marks"]) / f"{batch.number}-{fault}"
        if fault == "always_dies" or (fault and not mark.exists()):
            mark.touch()
            if fault == "slow":
                time.sleep(1)
            elif fault != "fails":
                os.kill(os.getpid(), signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
        if fault != "fails":
            counts = FilterCounts(kept=batch.number)
            setup.spool.write(replace(batch, version=batch.only or 0, counts=counts, worker=worker))
        connection.send((batch, "no room" if fault == "fails" else None))


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`pool(faults by number, count=2)`: a context with a pool of such workers. Twelve seconds are a hang: no slow disk
    takes as long."""
    monkeypatch.setattr(worker_pool, "work", faulty)

    @contextmanager
    def make(faults: dict[str, Any], count: int = 2) -> Iterator[WorkerPool]:
        weights, beats = SharedWeights(torch.nn.Linear(2, 2)), torch.zeros(count, dtype=torch.float64).share_memory_()
        setup = WorkerSetup(faults | {"marks": str(tmp_path)}, 1, weights, Spool(tmp_path, 0), beats, 1)
        workers = [Worker(number, setup) for number in range(count)]
        with WorkerPool(setup, workers, hang_seconds=12 if "stop" in faults.values() else 60) as made:
            yield made

    return make


def batches(count: int, only: int | None = None) -> list[RolloutBatch]:
    return [RolloutBatch(number, 4 * number, 8, True, only) for number in range(count)]


def answer(pool: WorkerPool, asked: list[RolloutBatch]) -> dict[int, int]:
    """Have them all answered; number → how often an answer was there to take."""
    for batch in asked:
        pool.begin(batch)
    taken: dict[int, int] = {}
    deadline = time.monotonic() + 180
    while len(taken) < len(asked):
        assert time.monotonic() < deadline, f"answered: {sorted(taken)}"
        pool.wait(lambda: None)
        for begun in [begun for begun in asked if begun.number not in taken]:
            if batch := pool.take(begun):
                assert batch.counts["kept"] == batch.number
                taken[batch.number] = taken.get(batch.number, 0) + 1
    return taken


def test_what_a_dead_or_hung_worker_was_asked_others_answer(pool: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pool({"1": "kill", "4": "stop", "6": "kill"}) as workers:
        assert answer(workers, batches(8)) == dict.fromkeys(range(8), 1)
        assert workers.deaths == 3
    told = capfd.readouterr().err
    assert told.count("died; others answer for it") == 2
    assert "did not move for" in told


def test_a_worker_that_had_nothing_to_do_is_not_hung(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It last moved a thousand seconds before it is asked."""
    with pool({}, count=1) as workers:
        answer(workers, batches(1))
        later = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + 1000)
        monkeypatch.setattr(worker_pool, "time", later)
        workers.begin(batches(2)[1])
        workers.poll()
        assert workers.deaths == 0


@pytest.mark.slow
def test_workers_that_only_die_end_the_run(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some rest in between."""
    monkeypatch.setattr(worker_pool, "_REST_SECONDS", 0.001)
    with pool({"every": "always_dies"}, count=1) as workers, pytest.raises(RunError, match="all rollout workers die"):
        answer(workers, batches(1))
    assert workers.deaths == 8


def test_what_no_worker_can_do_ends_the_run_at_once(pool: Any) -> None:
    with pool({"2": "fails"}, count=1) as workers, pytest.raises(RunError, match="cannot go on: no room"):
        answer(workers, batches(4))
    assert workers.deaths == 0


def test_an_answer_that_was_given_up_is_not_believed(pool: Any) -> None:
    """It comes when its number has been drawn again, for newer weights."""
    with pool({"0": "slow"}, count=1) as workers:
        (old,), (new,) = batches(1, only=1), batches(1, only=2)
        workers.begin(old)
        time.sleep(0.5)
        workers.give_up()
        assert answer(workers, [new]) == {0: 1}
        assert workers.spool.read(new).version == 2
        assert workers.spool.read(old) is None


def test_what_arrived_before_a_crash_is_not_made_again(pool: Any, tmp_path: Path) -> None:
    """Unless it is damaged."""
    for batch in batches(2):
        Spool(tmp_path, 0).write(replace(batch, counts=FilterCounts(kept=batch.number), worker=77))
    damaged = Spool(tmp_path, 0).path(1)
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pool({}, count=1) as workers:
        answer(workers, batches(2))
        assert [workers.spool.read(batch).worker == 77 for batch in batches(2)] == [True, False]


def test_the_idle_share_is_of_the_time_of_all_workers(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock and workers of the test's own."""
    clock, ends = SimpleNamespace(now=100.0), []

    def start(worker: Worker) -> None:
        worker.setup.beats[worker.number] = time.monotonic()
        worker.process = Mock()
        worker.connection, its_end = multiprocessing.Pipe()
        ends.append(its_end)

    monkeypatch.setattr(worker_pool, "time", SimpleNamespace(time=lambda: clock.now, monotonic=time.monotonic))
    monkeypatch.setattr(Worker, "start", start)
    with pool({}) as workers:
        asked = batches(7)

        def answered(worker: int, number: int, began: float, seconds: float) -> None:
            workers.spool.write(replace(asked[number], worker=worker, began=began, seconds=seconds))
            ends[worker].send((asked[number], None))

        def share(*numbers: int, at: float) -> float:
            clock.now = at
            workers.poll()
            assert all(workers.take(asked[number]) for number in numbers)
            return workers.idle_share()

        for number in range(3):  # 0 and then 2 for one worker, 1 for the other
            workers.begin(asked[number])
        answered(0, 0, 100, 6)
        assert share(0, at=110) == 0  # both are at work, one at its second batch
        answered(0, 2, 106, 8)
        assert share(2, at=120) == pytest.approx(6 / 20)  # from 114 on one has nothing to do
        workers.begin(asked[3])
        answered(0, 3, 121, 5)
        answered(1, 1, 100, 22)
        assert share(1, 3, at=130) == pytest.approx(1 - (5 + 2) / 20)
        workers.begin(asked[4])
        answered(0, 4, 130, 1)
        clock.now = 140  # nobody has looked for that answer when more is asked
        workers.begin(asked[5])
        workers.begin(asked[6])
        assert share(4, at=150) == pytest.approx(1 - (1 + 10 + 10) / 40)
        assert share(at=160) == 0


def test_a_filling_that_was_broken_off_is_drawn_again(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had begun is for weights that are gone: nobody waits for that."""
    with pool({}, count=1) as workers:
        worker: Any = SimpleNamespace(config=None, problems=4, ranks=1, engine=Mock())
        collector = InTurn(worker, cast(Any, None), workers, rank=0)
        collector.version = 1
        begun = collector.draw(only_newest=True)
        collector.version = 2
        deadline, wait = time.monotonic() + 120, workers.wait

        def waiting(heartbeat: Any) -> None:
            assert time.monotonic() < deadline
            wait(heartbeat)

        monkeypatch.setattr(workers, "wait", waiting)
        batch = collector.next(1)
        assert batch is not None
        assert (batch.number, batch.first, batch.only) == (begun.number, begun.first, 2)
