"""How a run is started on this machine, watched and restarted: the options of `scripts/launch.py`."""

import re
from dataclasses import dataclass

from pydantic import Field, field_validator

from mai_thinking.config.base import Seconds, Section, Whole
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
    """The faults of `LaunchSection.chaos`; ValueError, in one line, for any other text."""
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


class LaunchSection(Section):
    """Carried out by `mai_thinking.launch.launcher`."""

    nproc: int = Field(1, ge=1, le=1024)
    """Data-parallel workers on this machine."""
    restarts: Whole = 10
    """So many restarts are allowed within any `window_seconds`; one more ends the job with the first failure."""
    window_seconds: Seconds = 600
    """The budget of restarts is for so long a time: a long job may have many faults, a broken one may not."""
    fruitless_restarts: Whole = 3
    """After so many restarts in a row without one new step, the job ends: it would crash there for ever."""
    hang_seconds: Seconds = 300
    """A job that does not move for so long is taken to hang, and is restarted. Generated tokens, evaluated texts and
    saved chunks move it, as steps do."""
    start_seconds: Seconds = 1200
    """The same, before an attempt's first step."""
    grace_seconds: Seconds = 120
    """After a SIGTERM or Ctrl-C the workers have so long to finish their step and save."""
    jit_seconds: float = Field(20, ge=0, le=1e9)
    """When a worker dies, those that can save the run without it have so long for that."""
    chaos: str = ""
    """Faults to inject, such as `kill:60s,hang:300s,torn-checkpoint:1`; empty injects none. A time is a period: one
    fault in each, at a random moment of it. A number is a count of faults that wait for their occasion."""
    chaos_seed: Whole = 0
    """What the moments and the victims of the faults are drawn from."""

    @field_validator("chaos")
    @classmethod
    def _check_chaos(cls, chaos: str) -> str:
        parse_faults(chaos)
        return chaos
