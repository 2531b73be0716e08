"""Finds, on a machine without an accelerator, the tensors that would be on the wrong device in a collective.

Every tensor lies on the CPU here. So a tensor is *there* (on the accelerator) if it was made with the ranks' device,
moved to it, or computed from a tensor that is there; otherwise it is on the host. NCCL, which is what the default group
would be, takes those that are there; gloo groups, which somebody has asked for by name, take the others. Only our own
collectives are looked at, not those that PyTorch and the library make.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = ("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor",
               "all_to_all_single")  # fmt: skip
MARK = "_is_there"


def _names_it(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) and leaf == Placement.DEVICE


class Placement(TorchFunctionMode):
    """Within, collectives raise AssertionError for tensors on the wrong device."""

    DEVICE = torch.device("cpu", 0)
    """Stands for the accelerator: tensors that lie on the CPU never have an index."""

    def __init__(self) -> None:
        super().__init__()
        self.checked = 0
        self._gloo: list[Any] = []

    def is_there(self, tensor: torch.Tensor) -> bool:
        """Whether it would be on the accelerator."""
        return getattr(tensor, MARK, False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        there = any(self.is_there(tensor) for tensor in tensors)
        out = func(*args, **kwargs)
        if name == "__get__" and isinstance(out, torch.device):
            return self.DEVICE if there else out
        if isinstance(out, torch.Tensor) and self._moves(func, leaves):
            there = any(_names_it(leaf) for leaf in leaves)
            out = out.clone() if there != self.is_there(out) else out  # on one device, moving gives the same tensor
        elif any(_names_it(leaf) for leaf in leaves):
            there = True
        if name == "__set__" and there:  # parameter.data = moved
            setattr(args[0], MARK, True)
        if there and not (name.endswith("_") and not name.endswith("__")):  # a tensor that is written to stays put
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    setattr(leaf, MARK, True)
        return out

    @staticmethod
    def _moves(func: Any, leaves: list[Any]) -> bool:
        rest = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        moved = any(isinstance(leaf, torch.device) or leaf == "cpu" for leaf in rest)
        name = getattr(func, "__name__", "")
        return name == "cpu" or (name == "to" and moved)

    def __enter__(self) -> "Placement":
        self._before = {name: getattr(dist, name) for name in (*COLLECTIVES, "new_group")}
        for name in COLLECTIVES:
            setattr(dist, name, self._checking(name, self._before[name]))

        def new_group(*args: Any, **kwargs: Any) -> Any:
            group = self._before["new_group"](*args, **kwargs)
            if kwargs.get("backend") == "gloo":
                self._gloo.append(group)
            return group

        dist.new_group = new_group
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, function in self._before.items():
            setattr(dist, name, function)

    def _checking(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.partition(".")[0] in ("torch", "transformers"):  # whose buffers they make themselves
                return collective(*args, **kwargs)
            groups = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, dist.ProcessGroup)]
            on_host = any(group is gloo for group in groups for gloo in self._gloo)
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    assert self.is_there(leaf) != on_host, (
                        f"{name} of a tensor on the {'device' if on_host else 'host'}"
                    )
                    self.checked += 1
            return collective(*args, **kwargs)

        return checked
