"""How a run is started on this machine, watched and restarted: the options of `scripts/launch.py`."""

from pydantic import Field, field_validator

from mai_thinking.config.base import Section
from mai_thinking.config.faults import parse_faults


class LaunchSection(Section):
    """Carried out by `mai_thinking.training.launch`."""

    nproc: int = Field(1, ge=1)
    """Data-parallel workers on this machine."""

    restarts: int = Field(10, ge=0)
    """So many restarts are allowed within any `window_seconds`; one more ends the job with the first failure."""

    window_seconds: float = Field(600, gt=0)
    """The budget of restarts is for so long a time: a long job may have many faults, a broken one may not."""

    fruitless_restarts: int = Field(3, ge=0)
    """After so many restarts in a row without one new step, the job ends: it would crash there for ever."""

    hang_seconds: float = Field(300, gt=0)
    """A job that completes no step for so long is taken to hang, and is restarted. Longer than the longest
    evaluation."""

    start_seconds: float = Field(1200, gt=0)
    """The same, before an attempt's first step."""

    grace_seconds: float = Field(120, gt=0)
    """After a SIGTERM or Ctrl-C the workers have so long to finish their step and save."""

    survivor_seconds: float = Field(20, ge=0)
    """When a worker dies, those that can save the run without it have so long for that."""

    chaos: str = ""
    """Faults to inject, as `mai_thinking.config.faults` has them; empty injects none."""

    chaos_seed: int = Field(0, ge=0)
    """What the moments and the victims of the faults are drawn from."""

    @field_validator("chaos")
    @classmethod
    def _chaos_can_be_read(cls, chaos: str) -> str:
        parse_faults(chaos)
        return chaos
