"""What every benchmark is asked with."""

from dataclasses import dataclass
from pathlib import Path

from mai_thinking.bench.machine import Ceiling


@dataclass(frozen=True)
class Options:
    """From the command line."""

    model: Path
    """A model folder, for those that start from a trained model."""
    rounds: int
    """How often each side has its turn."""
    ceiling: Ceiling
    """Sampled before the benchmark starts, and after it; a benchmark may do so too."""
