"""Sources, cleaning, tokenizer, mixture, packing: everything between text and batches.

The names are looked up when they are used: torch is not loaded for who reads a file of questions.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mai_thinking.data.loader import Batch, Loader
    from mai_thinking.data.preparation import prepare
    from mai_thinking.data.prepared import PreparedData

__all__ = ["Batch", "Loader", "PreparedData", "prepare"]

_HOMES = {"Batch": "loader", "Loader": "loader", "PreparedData": "prepared", "prepare": "preparation"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
