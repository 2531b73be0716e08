"""What the figures were measured on, and what that machine can do at best."""

import os
import platform
import re
from pathlib import Path

import accelerate
import torch
import transformers

from mai_thinking import __version__
from mai_thinking.bench.measure import Turn, alternate


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
    linux = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", linux.read_text(), re.MULTILINE) if linux.exists() else None
    return named[1] if named else platform.processor()


def sample_ceiling(*, size: int = 1536, megabytes: int = 128, rounds: int = 5) -> dict[str, list[Turn]]:
    """Turns of a large fp32 `product`, in GFLOP, and of a large `copy`, in GB: bytes read and written both count, and
    should be beyond all caches."""
    a, b, out = (torch.randn(size, size) for _ in range(3))
    source = torch.zeros(megabytes * 2**18)
    target = torch.zeros_like(source)

    def product() -> float:
        torch.mm(a, b, out=out)
        return 2e-9 * size**3

    def copy() -> float:
        target.copy_(source)
        return 2e-9 * source.nbytes

    return alternate({"product": product, "copy": copy}, rounds=rounds)
