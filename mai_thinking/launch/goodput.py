"""Goodput: which share of the wall-clock trained the model, and where the rest went (MAI-Thinking-1 report §2.8, §6.2).

Two definitions, because they are both in use:

- **the report's**: ideal training time / wall-clock. Ideal is what the kept steps would have taken at the run's own
  best throughput, plus the evaluations, which are part of the plan. Steps slower than the best count against it (the
  report's "MFU drop"), as do recomputation and all time without a step.
- **the common one**, of Google's ml-goodput-measurement: time in kept steps / wall-clock. A slow step is productive,
  but an evaluation is not ("custom badput"), nor is waiting for data, saving, start-up (with what each attempt's first
  step takes longer than the others), recomputation and the time from a fault to the next attempt.

Time during which a run was stopped on request is in neither: nobody waited for it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mai_thinking.training.ledger import (
    CATEGORIES,
    CHECKPOINT,
    DATA,
    EVALUATION,
    OTHER,
    PRODUCTIVE,
    RECOMPUTATION,
    RESTART,
    SLOW,
    START_UP,
)
from mai_thinking.training.metrics import Record, read_records

BEST_WINDOW = 50
"""The run's own best throughput is the best mean over so many consecutive kept steps (all, if there are fewer)."""


class Account:
    """Where a run's wall-clock went, from the first event of its `events.jsonl` to the last. All times in seconds."""

    def __init__(self, events: Sequence[Record]) -> None:
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)
        """Per category; the sum is `wall_clock`."""
        self.segments: list[tuple[str, float, float]] = []
        """The timeline: (category, begin, end). Slow steps are spread over the productive ones."""
        self.stopped = 0.0
        """Between an orderly end and the next attempt: not part of the wall-clock."""
        self.attempts = self.steps = self.recomputed_steps = 0
        """`steps`: those computed for the first time."""
        self.step_seconds: list[tuple[float, float]] = []
        """(end, seconds without waiting for data) of every one of them, but for each attempt's first."""
        self.best_step_seconds = 0.0
        self.recoveries: list[float] = []
        """For each restart after a fault, the seconds from the last event before it to the first completed step."""
        self.rescued = 0
        """Restarts after a fault that lost no completed step: a rank that was left had saved (`JitCheckpoint`)."""
        self.saves: list[float] = []
        """What each checkpoint cost the loop."""
        # Every event covers what lies between this cursor and its end.
        self._cursor = self.begin = events[0]["time"] if events else 0.0
        self._highest = 0  # the last step that any attempt completed
        self._starting: str | None = None  # the category of time before an attempt's first step; None after it
        self._ended = True
        self._last_before_fault: float | None = None
        self._first_steps: list[tuple[float, str]] = []  # (seconds, category of its excess) of new first steps
        for event in events:
            self._take(event)
        self._separate_slow_steps()

    @property
    def wall_clock(self) -> float:
        """Without the time in which it was stopped."""
        return sum(self.seconds.values())

    @property
    def report_goodput(self) -> float:
        """The report's definition, between 0 and 1."""
        return self.share(PRODUCTIVE, EVALUATION)

    @property
    def common_goodput(self) -> float:
        """ml-goodput-measurement's definition, between 0 and 1."""
        return self.share(PRODUCTIVE, SLOW)

    def share(self, *categories: str) -> float:
        """Of the wall-clock, what went into these categories."""
        return sum(self.seconds[category] for category in categories) / max(self.wall_clock, 1e-9)

    def _take(self, event: Record) -> None:
        end, seconds = event["time"], event.get("seconds", 0.0)
        if event["event"] == "attempt":
            self._begin_attempt(end)
        elif event["event"] in ("step", "span", "end"):
            self._cover_until(end - seconds, self._starting or OTHER)
        match event["event"]:
            case "step":
                self._step(event)
            case "span":
                # What an attempt does before its first step is part of starting, but for evaluations.
                own = event["category"]
                self._cover_until(end, own if own == EVALUATION else self._starting or own)
                if own == CHECKPOINT:
                    self.saves.append(seconds)
            case "end":
                self._ended = True

    def _begin_attempt(self, start: float) -> None:
        self._last_before_fault = None if self._ended else self._cursor
        self._starting = START_UP if self._ended else RESTART
        if self._ended:
            self.stopped += max(0.0, start - self._cursor)
            self._cursor = max(start, self._cursor)
        else:
            self._cover_until(start, RESTART)
        self.attempts += 1
        self._ended = False

    def _step(self, event: Record) -> None:
        end, new = event["time"], event["step"] > self._highest
        self._cover_until(end - event["seconds"] + event["data_wait"], DATA)
        taken = self._cover_until(end, PRODUCTIVE if new else RECOMPUTATION)
        self._highest = max(self._highest, event["step"])
        self.steps += new
        self.recomputed_steps += not new
        if new and self._starting:
            self._first_steps.append((taken, self._starting))
        elif new:
            self.step_seconds.append((end, taken))
        if self._starting and self._last_before_fault is not None:
            self.rescued += new
            self.recoveries.append(end - self._last_before_fault)
        self._starting = None

    def _cover_until(self, end: float, category: str) -> float:
        """Give the time from the cursor to `end` to `category`; returns how much that was."""
        begin, length = self._cursor, max(0.0, end - self._cursor)
        if length:
            if self.segments and self.segments[-1][0] == category:
                begin = self.segments.pop()[1]
            self.segments.append((category, begin, end))
            self.seconds[category] += length
            self._cursor = end
        return length

    def _separate_slow_steps(self) -> None:
        """Take out of the productive seconds what the kept steps took longer than at the run's own best.

        For an attempt's first step the excess belongs to starting (compilation, cold caches); for the others to slow
        steps.
        """
        seconds = [taken for _, taken in self.step_seconds]
        if not seconds:
            return
        window = min(BEST_WINDOW, len(seconds))
        means = np.convolve(seconds, np.full(window, 1 / window), "valid")
        self.best_step_seconds = best = min(float(means.min()), sum(seconds) / len(seconds))
        excess = [(max(0.0, taken - best), starting) for taken, starting in self._first_steps]
        for over, category in (*excess, (sum(seconds) - best * len(seconds), SLOW)):
            self.seconds[PRODUCTIVE] -= over
            self.seconds[category] += over


def account_of(run: Path) -> Account:
    """The account of the run in folder `run`."""
    return Account(read_records(run / "events.jsonl"))
