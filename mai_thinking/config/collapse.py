"""When a run is taken for collapsed."""

from pydantic import Field

from mai_thinking.config.base import Section


class CollapseSection(Section):
    """`collapse:` in an RL run's config; `mai_thinking.rl.collapse` carries it out.

    Every sign is held against the run's own history, so that the defaults fit runs of any size.
    """

    enabled: bool = True
    """Stop a collapsed run with exit code 3. Off, the run goes on whatever its numbers say."""
    window: int = Field(50, ge=10)
    """Readings of a sign that make up its history: their median is what is usual."""
    warmup: int = Field(5, ge=3)
    """Readings of a sign before it is judged."""
    threshold: float = Field(6.0, gt=0)
    """Excess, summed over readings, with which a sign raises its alarm, and with which harm in a sign's company is a
    collapse. Lower is earlier, and oftener wrong."""
