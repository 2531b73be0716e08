"""Memory that is freed stays with the process."""

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator only")
PROBE = """
import resource, sys, torch
from mai_thinking.training.process import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() == (sys.argv[2] == "done")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    for _ in range(20):
        torch.ones(2**24)
use()
before = faults()
use()
print((faults() - before) * resource.getpagesize() / (20 * 2**26))
"""
"""Prints which share of the pages of twenty tensors of 64 MiB the kernel had to give, after twenty others."""


def share_fetched(*arguments: str, **variables: str) -> float:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | variables
    command = [sys.executable, "-c", PROBE, *arguments]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_freed_memory_is_used_again_without_the_kernel():
    assert share_fetched("leave") > 0.9
    assert share_fetched("keep", "done") < 0.01


def test_the_users_own_tunables_are_left_alone():
    assert share_fetched("keep", "left", MALLOC_MMAP_MAX_="65536") > 0.9
