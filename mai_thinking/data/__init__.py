"""Sources, cleaning, tokenizer, mixture, packing: everything between text and batches.

prepared = prepare(config.data)
with Loader(prepared, context_length=1024, micro_batch_size=4, rows_per_step=16) as loader:
    for batch in loader: …

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
