"""What a checkpoint holds, as trees of tensors and JSON values: no pickle anywhere.

A *tree* is nested dicts, lists and tuples with tensors, numbers, strings, booleans and None as leaves. `split_tree`
takes it apart into named tensors, which are saved as safetensors, and a JSON skeleton with the tensors' names in it;
`join_tree` is the inverse.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

TENSOR, PAIRS, TUPLE = "$tensor", "$pairs", "$tuple"
"""The keys that mark, in a skeleton, a tensor's name, a dict whose keys are not strings, and a tuple."""


def split_tree(tree: Any, name: str, tensors: dict[str, Tensor], seen: dict[Any, str] | None = None) -> Any:
    """Put the tensors of `tree` into `tensors` under names that begin with `name`; return the JSON skeleton. A tensor
    that occurs twice (tied weights) is put in once; both places of the skeleton name it."""
    seen = {} if seen is None else seen
    match tree:
        case Tensor():
            local = tree.to_local() if isinstance(tree, DTensor) else tree
            identity = (local.data_ptr(), local.shape, local.stride(), local.dtype, tree.shape)
            if local.numel() == 0 or identity not in seen:
                seen[identity] = name
                tensors[name] = tree.detach()
                return {TENSOR: name}
            return {TENSOR: seen[identity]}
        case Mapping() if all(isinstance(key, str) for key in tree):
            return {key: split_tree(value, f"{name}/{key}", tensors, seen) for key, value in tree.items()}
        case Mapping():
            pairs = tree.items()
            return {PAIRS: [[key, split_tree(value, f"{name}/{key}", tensors, seen)] for key, value in pairs]}
        case list():
            return [split_tree(value, f"{name}/{index}", tensors, seen) for index, value in enumerate(tree)]
        case tuple():
            return {TUPLE: [split_tree(value, f"{name}/{index}", tensors, seen) for index, value in enumerate(tree)]}
        case None | bool() | int() | float() | str():
            return tree
    raise TypeError(f"{name}: a checkpoint holds tensors and JSON values, not a {type(tree).__name__}")


def join_tree(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `split_tree` took apart."""
    match skeleton:
        case {"$tensor": str(name)}:
            return tensors[name]
        case {"$pairs": list(pairs)}:
            return {key: join_tree(value, tensors) for key, value in pairs}
        case {"$tuple": list(values)}:
            return tuple(join_tree(value, tensors) for value in values)
        case dict():
            return {key: join_tree(value, tensors) for key, value in skeleton.items()}
        case list():
            return [join_tree(value, tensors) for value in skeleton]
    return skeleton


def write_tree(path: Path, tree: Any) -> None:
    """Into one safetensors file. Whoever dies leaves it to the page cache: it does not wait for the disk."""
    tensors: dict[str, Tensor] = {}
    skeleton = split_tree(tree, "", tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"tree": json.dumps(skeleton)})


def read_tree(path: Path) -> Any:
    """What `write_tree` wrote."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return join_tree(json.loads(file.metadata()["tree"]), tensors)


class PerRank:
    """Marks a state as this rank's own (its generators, its place in the data): saved and loaded rank by rank. At
    another world size than it was saved with, `state` must have a method `load_from_world(states, rank, world)`, which
    takes up, as rank `rank` of `world`, the states of all ranks that saved; else loading is a UsageError."""

    def __init__(self, state: Stateful):
        self.state = state


class ModelState:
    """A model's parameters and persistent buffers by their plain names, whatever wraps it (DDP, FSDP2, compile)."""

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """name → Tensor (replicated) or DTensor (FSDP2), sharing memory with the model."""
        return get_model_state_dict(self.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the values into the model. Missing and unknown names are errors."""
        set_model_state_dict(self.model, state)


class OptimizerState:
    """An optimiser's state by parameter names, whatever wraps the model, so that it loads at another world size."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """`{"state": {name: {"exp_avg": …}}, "param_groups": […]}`, tensors shared with the optimiser."""
        return dict(get_optimizer_state_dict(self.model, self.optimizer))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy the values into the optimiser. What holds for its groups is the config's to say, and how they are cut
        depends on the ranks."""
        state["param_groups"] = self.state_dict()["param_groups"]
        set_optimizer_state_dict(self.model, self.optimizer, state)


class RandomState:
    """Every random generator of this process: Python's, NumPy's, PyTorch's on the CPU and on the current GPU.
    Generators that a component owns belong in that component's state. Wrap this in `PerRank`."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values and uint8 tensors."""
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        state = {
            "python": random.getstate(),
            "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set every generator as it was."""
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())

    def load_from_world(self, states: list[Any], rank: int, world: int) -> None:
        """At another world size, rank r continues the generators of saved rank r; where there was none, it seeds new
        ones from a hash of rank 0's state and r: reproducible, and unlike any other rank's."""
        if rank < len(states):
            self.load_state_dict(states[rank])
            return
        digest = hashlib.sha256(states[0]["torch"].numpy().tobytes() + f"rank {rank} of {world}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % 2**63)
