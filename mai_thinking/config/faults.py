"""The language of `scripts/launch.py --chaos`: which faults to inject, and how often.

`kill:60s,hang:300s,torn-checkpoint:1` kills a worker in every minute, stops one in every five, and once cuts the newest
checkpoint in half. A time is a period: one fault in each, at a random moment of it. A number is a count of faults that
wait for their occasion.
"""

import re
from dataclasses import dataclass

from mai_thinking.config.names import nearest_name

TIMED = {
    "kill": "SIGKILL to a random worker",
    "hang": "SIGSTOP to a random worker: alive, but not moving",
    "term": "SIGTERM to the launcher: the job saves and ends with exit code 75",
}
COUNTED = {
    "kill-in-save": "SIGKILL to a random worker while a checkpoint is being written",
    "torn-checkpoint": "a random file of the newest checkpoint is cut in half, and a worker killed",
}
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Fault:
    """One entry: a timed kind has a `period` in seconds, a counted one a `count`."""

    kind: str
    period: float = 0.0
    count: int = 0


def parse_faults(text: str) -> list[Fault]:
    """Read `kind:60s,kind:2,…`; ValueError, in one line, for anything else. An empty text is no faults."""
    return [_parse_fault(entry.strip()) for entry in text.split(",") if entry.strip()]


def _parse_fault(entry: str) -> Fault:
    kind, _, amount = entry.partition(":")
    if kind in TIMED:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", amount)
        if not match or float(match[1]) == 0:
            raise ValueError(f"{entry!r}: give a period, such as {kind}:60s (units s, m, h)")
        return Fault(kind, period=float(match[1]) * _UNITS[match[2]])
    if kind in COUNTED:
        if not amount.isdigit() or int(amount) == 0:
            raise ValueError(f"{entry!r}: give a count, such as {kind}:1")
        return Fault(kind, count=int(amount))
    raise ValueError(f"unknown fault {kind!r}; {nearest_name(kind, (*TIMED, *COUNTED))}")
