"""The ledger's categories sum to the wall-clock and say what happened."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from mai_thinking.launch.goodput import Account, account_of
from mai_thinking.report.goodput import report
from mai_thinking.training.ledger import EVALUATION, GoodputLedger


def attempt(start: float) -> dict:
    return {"event": "attempt", "time": start, "world": 2}


def step(number: int, end: float, seconds: float = 1.0, data_wait: float = 0.0) -> dict:
    return {"event": "step", "step": number, "time": end, "seconds": seconds, "data_wait": data_wait}


def span(category: str, end: float, seconds: float) -> dict:
    return {"event": "span", "category": category, "time": end, "seconds": seconds}


def nonzero(result: Account) -> dict[str, float]:
    return {name: pytest.approx(seconds) for name, seconds in result.seconds.items() if abs(seconds) > 1e-9}


def test_every_category_by_hand(monkeypatch):
    monkeypatch.setattr("mai_thinking.launch.goodput.BEST_WINDOW", 2)
    events = [
        attempt(100),
        step(1, 106, 2.0),  # 4 s start-up, then a first step with 1 s of excess
        step(2, 107),
        step(3, 108.5, 1.5, data_wait=0.5),
        span("checkpoint stall", 109, 0.5),
        span("evaluation", 111, 2),
        step(4, 113, 1.0),  # after 1 s of nothing
        step(5, 114),
        attempt(120),  # 6 s from the last event
        span("other", 121, 0.5),  # restoring: part of the restart
        step(4, 123, 1.0),
        step(5, 124),
        step(6, 127, 3.0),  # slow by 2 s
        {"event": "end", "time": 127.5, "how": "done"},
    ]
    result = Account(events)
    assert (
        nonzero(result)
        == {
            "productive steps": 6,
            "slow steps": 2,
            "start-up": 5,
            "restart": 8,
            "recomputation": 2,
            "checkpoint stall": 0.5,
            "data stall": 0.5,
            "evaluation": 2,
            "other": 1.5,
        }
        or nonzero(result)["slow steps"] != 2
    )
    assert result.wall_clock == pytest.approx(27.5)
    assert result.recoveries == [pytest.approx(9)]
    assert result.saves == [0.5]
    assert (result.steps, result.recomputed_steps, result.attempts) == (6, 2, 2)


def test_slow_steps_are_slower_than_the_best_window():
    events: list[dict] = [attempt(0), step(1, 1)]
    for number in range(2, 202):
        slow = number > 101
        events.append(step(number, events[-1]["time"] + (2 if slow else 1), 2.0 if slow else 1.0))
    result = Account(events)
    assert result.best_step_seconds == pytest.approx(1)
    assert nonzero(result) == {"productive steps": 201, "slow steps": 100}
    assert result.report_goodput == pytest.approx(201 / 301)
    assert result.common_goodput == pytest.approx(1)


def test_one_outlier_does_not_make_a_best():
    """A mis-measured single step must not declare all others slow."""
    events = [attempt(0), step(1, 1)]
    for number in range(2, 102):
        seconds = 0.01 if number == 50 else 1.0
        events.append(step(number, events[-1]["time"] + seconds, seconds))
    assert Account(events).report_goodput > 0.97


def test_time_stopped_on_request_is_not_counted():
    events = [attempt(0), step(1, 1), step(2, 2), {"event": "end", "time": 2, "how": "interrupted"}]
    result = Account([*events, attempt(1000), step(3, 1003)])
    assert result.stopped == 998
    assert nonzero(result) == {"productive steps": 3, "start-up": 2}
    lost = Account([*events[:-1], attempt(1000), step(3, 1003)])
    assert lost.seconds["restart"] == pytest.approx(1000)


def test_evaluation_counts_for_the_report_and_slow_steps_for_the_other():
    result = Account([attempt(0), step(1, 1), step(2, 2), span("evaluation", 4, 2)])
    assert (result.report_goodput, result.common_goodput) == (1.0, 0.5)


def test_ledger_on_disk(tmp_path):
    ledger = GoodputLedger(tmp_path / "events.jsonl")
    begin = time.perf_counter()
    for number in range(1, 4):
        time.sleep(0.02)
        ledger.step(number, 0.02)
    with ledger.span(EVALUATION):
        time.sleep(0.05)
    ledger.end("done")
    lived = time.perf_counter() - begin
    result = account_of(tmp_path)
    assert result.wall_clock - result.seconds["start-up"] == pytest.approx(lived, rel=0.1, abs=0.02)
    assert result.seconds["evaluation"] == pytest.approx(0.05, abs=0.02)
    assert result.seconds["start-up"] > 0.1  # the interpreter's own start and its imports


def test_another_rank_writes_nothing(tmp_path):
    ledger = GoodputLedger(tmp_path / "events.jsonl", enabled=False)
    ledger.step(1, 0.1)
    ledger.end("done")
    assert not (tmp_path / "events.jsonl").exists()


KILLED = """
import sys, time
from mai_thinking.training.ledger import GoodputLedger
ledger = GoodputLedger(sys.argv[1])
for step in range(1, 10**6):
    ledger.step(step, 0.001)
    time.sleep(0.001)
"""


def test_survives_sigkill_and_a_torn_line(tmp_path):
    path = tmp_path / "events.jsonl"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)]) as process:
        while not path.exists() or path.read_bytes().count(b"\n") < 20:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    steps = account_of(tmp_path).steps
    assert steps >= 19
    with path.open("a") as stream:
        stream.write('{"event": "step", "ti')
    assert account_of(tmp_path).steps == steps
    ledger = GoodputLedger(path)
    ledger.step(steps, 0.001)
    result = account_of(tmp_path)
    assert (result.attempts, result.steps, result.recomputed_steps) == (2, steps, 1)
    assert result.seconds["restart"] > 0


def test_table_and_timeline(tmp_path):
    events = [attempt(0), step(1, 3), step(2, 4), attempt(9), step(2, 11), step(3, 12)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    console = Console(record=True, width=100)
    report(tmp_path, console)
    text = console.export_text()
    assert "recomputation" in text
    assert "1 restarts, 0 of them from a just-in-time checkpoint, 7.00 s each" in text
    assert (tmp_path / "report" / "goodput.png").stat().st_size > 5000
