"""How a run is started on this machine, watched and restarted: the options of `scripts/launch.py`."""

from pydantic import Field, field_validator

from mai_thinking.config.base import Seconds, Section, Whole
from mai_thinking.config.faults import parse_faults


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
    """Faults to inject, as `mai_thinking.config.faults` has them; empty injects none."""

    chaos_seed: Whole = 0
    """What the moments and the victims of the faults are drawn from."""

    @field_validator("chaos")
    @classmethod
    def _chaos_can_be_read(cls, chaos: str) -> str:
        parse_faults(chaos)
        return chaos
