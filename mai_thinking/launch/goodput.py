"""Goodput: which share of the wall-clock trained the model, and where the rest went (MAI-Thinking-1 report §2.8, §6.2).

`account` divides the wall-clock of a run's `events.jsonl`, from the first event to the last, into categories that sum
to it.

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
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass
class Segment:
    """A stretch of the timeline: [begin, end) in Unix seconds."""

    category: str
    begin: float
    end: float


@dataclass
class Account:
    """Where a run's wall-clock went. All times in seconds."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    """Per category; the sum is `wall_clock`."""
    segments: list[Segment] = field(default_factory=list)
    """The timeline. Slow steps are not separate stretches of it: they are spread over the productive ones."""
    begin: float = 0.0
    stopped: float = 0.0
    """Between an orderly end and the next attempt: not part of the wall-clock."""
    attempts: int = 0
    steps: int = 0
    """Steps computed for the first time."""
    recomputed_steps: int = 0
    best_step_seconds: float = 0.0
    recoveries: list[float] = field(default_factory=list)
    """For each restart after a fault, the seconds from the last event before it to the first completed step."""
    rescued: int = 0
    """Restarts after a fault that lost no completed step: a rank that was left had saved (`JitCheckpoint`)."""
    saves: list[float] = field(default_factory=list)
    """What each checkpoint cost the loop."""
    step_seconds: list[tuple[float, float]] = field(default_factory=list)
    """(end in Unix seconds, seconds without waiting for data) of every step computed for the first time."""

    @property
    def wall_clock(self) -> float:
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


def account(events: Sequence[Record]) -> Account:
    """Divide the wall-clock of a run's events into the categories."""
    result = Account()
    walk = _Walk(result)
    for event in events:
        walk.take(event)
    _separate_slow_steps(result, walk.first_steps)
    return result


def account_of(run: Path) -> Account:
    """The account of the run in folder `run`."""
    return account(read_records(run / "events.jsonl"))


class _Walk:
    """Goes along the events with a cursor: every event covers what lies between the cursor and its end."""

    def __init__(self, result: Account):
        self.result = result
        self.cursor = 0.0
        self.highest = 0  # the last step that any attempt completed
        self.starting = START_UP  # the category of time before an attempt's first step; None after it
        self.in_start = True
        self.ended = False
        self.last_before_fault: float | None = None
        self.first_steps: list[tuple[float, str]] = []  # (seconds, category of its excess) of new first steps

    def take(self, event: Record) -> None:
        end, seconds = event["time"], event.get("seconds", 0.0)
        match event["event"]:
            case "attempt":
                self._begin_attempt(end)
            case "step":
                self._cover_until(end - seconds, self.starting if self.in_start else OTHER)
                self._step(event)
            case "span":
                # What an attempt does before its first step is part of starting, but for evaluations.
                starting = self.in_start and event["category"] != EVALUATION
                self._cover_until(end - seconds, self.starting if self.in_start else OTHER)
                self._cover_until(end, self.starting if starting else event["category"])
                if event["category"] == CHECKPOINT:
                    self.result.saves.append(seconds)
            case "end":
                self._cover_until(end, self.starting if self.in_start else OTHER)
                self.ended = True

    def _begin_attempt(self, start: float) -> None:
        if self.result.attempts == 0:
            self.cursor = self.result.begin = start
        elif self.ended:
            self.result.stopped += max(0.0, start - self.cursor)
            self.cursor = max(start, self.cursor)
            self.last_before_fault = None
        else:
            self.last_before_fault = self.cursor
            self._cover_until(start, RESTART)
        self.result.attempts += 1
        self.starting = START_UP if self.result.attempts == 1 or self.ended else RESTART
        self.in_start, self.ended = True, False

    def _step(self, event: Record) -> None:
        end, seconds, data_wait = event["time"], event["seconds"], event["data_wait"]
        self._cover_until(end - seconds + data_wait, DATA)
        new = event["step"] > self.highest
        if not new:
            self.result.recomputed_steps += 1
            self._cover_until(end, RECOMPUTATION)
        else:
            self.highest = event["step"]
            self.result.steps += 1
            taken = self._cover_until(end, PRODUCTIVE)
            if self.in_start:
                self.first_steps.append((taken, self.starting))
            else:
                self.result.step_seconds.append((end, taken))
        if self.in_start and self.last_before_fault is not None:
            self.result.rescued += new
            self.result.recoveries.append(end - self.last_before_fault)
            self.last_before_fault = None
        self.in_start = False

    def _cover_until(self, end: float, category: str) -> float:
        """Give the time from the cursor to `end` to `category`; returns how much that was."""
        length = max(0.0, end - self.cursor)
        if length:
            segments = self.result.segments
            if segments and segments[-1].category == category:
                segments[-1].end = end
            else:
                segments.append(Segment(category, self.cursor, end))
            self.result.seconds[category] += length
            self.cursor = end
        return length


def _separate_slow_steps(result: Account, first_steps: list[tuple[float, str]]) -> None:
    """Take out of the productive seconds what the kept steps took longer than at the run's own best.

    For an attempt's first step the excess belongs to starting (compilation, cold caches); for the others to slow steps.
    """
    seconds = [taken for _, taken in result.step_seconds]
    if not seconds:
        return
    window = min(BEST_WINDOW, len(seconds))
    sums = [sum(seconds[:window])]
    for leaving, entering in zip(seconds, seconds[window:], strict=False):
        sums.append(sums[-1] - leaving + entering)
    best = min(min(sums) / window, sum(seconds) / len(seconds))
    result.best_step_seconds = best
    for taken, starting in first_steps:
        excess = max(0.0, taken - best)
        result.seconds[PRODUCTIVE] -= excess
        result.seconds[starting] += excess
    slow = sum(seconds) - best * len(seconds)
    result.seconds[PRODUCTIVE] -= slow
    result.seconds[SLOW] += slow
