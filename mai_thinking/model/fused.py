"""Functions that are compiled by themselves, for a GPU, when they are first called."""

import functools

import torch

fused = functools.cache(torch.compile)
