"""When a run saves its whole state, and what it keeps."""

from mai_thinking.config.base import Count, Section


class CheckpointSection(Section):
    """`checkpoint:` in a run's config; `mai_thinking.training.checkpoint` carries it out."""

    every: Count = 100
    """Steps from one checkpoint to the next. The best value for a failure rate: `scripts/goodput.py project`."""

    keep: Count = 2
    """The newest so many are kept. At least 2, so that a damaged newest one leaves another to go back to."""

    keep_every: Count | None = None
    """Checkpoints of steps that this divides are kept for ever, besides the newest; null keeps none."""

    asynchronous: bool = True
    """Copy the state in the step and write it beside the following steps; false writes it in the step."""
