"""Functions that are compiled by themselves, for a GPU."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def fused(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled when it is first called."""
    return torch.compile(function)
