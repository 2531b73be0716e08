"""What the figures were measured on, and what that machine can do at best."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import accelerate
import torch
import transformers

from mai_thinking import __version__
from mai_thinking.bench.timing import Figure, Turn, alternate, rate


def describe() -> dict[str, str | int]:
    """Processor, cores that we may use, threads, and the versions that decide speed."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "mai_thinking": __version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class Ceiling:
    """A large matrix product and a large copy, fp32, sampled through the run."""

    def __init__(self, *, size: int = 1536, megabytes: int = 128) -> None:
        """`size` of the square product; `megabytes` of what is copied, which should be beyond all caches."""
        self._a, self._b, self._out = (torch.randn(size, size) for _ in range(3))
        self._source = torch.zeros(megabytes * 2**18)
        self._target = torch.zeros_like(self._source)
        self._products: list[Turn] = []
        self._copies: list[Turn] = []

    def sample(self, rounds: int = 5) -> None:
        """Measure, in turn."""
        turns = alternate({"product": self._multiply, "copy": self._copy}, rounds=rounds)
        self._products += turns["product"]
        self._copies += turns["copy"]

    def figures(self) -> dict[str, Figure]:
        """The product in GFLOP/s, and the copy in GB/s, read and written bytes both counted."""
        return {"product": rate(self._products, "GFLOP/s"), "copy": rate(self._copies, "GB/s")}

    def product_milliseconds(self, flops: float) -> float:
        """What so much arithmetic takes at the product's best rate so far: a disturbed one is no ceiling."""
        return 1e-6 * flops / max(turn.amount / turn.seconds for turn in self._products)

    def copy_milliseconds(self, moved: float) -> float:
        """What so many bytes take at the copy's best rate so far."""
        return 1e-6 * moved / max(turn.amount / turn.seconds for turn in self._copies)

    def _multiply(self) -> float:
        torch.mm(self._a, self._b, out=self._out)
        return 2e-9 * self._a.size(0) ** 3

    def _copy(self) -> float:
        self._target.copy_(self._source)
        return 2e-9 * self._source.nbytes


@dataclass(frozen=True)
class Options:
    """What every benchmark is asked with."""

    model: Path
    """A model folder, for those that start from a trained model."""
    rounds: int
    """How often each side has its turn."""
    ceiling: Ceiling
    """Sampled before the benchmark starts, and after it; a benchmark may do so too."""
