"""Sources, cleaning, tokenizer, mixture, packing: everything between text and batches.

prepared = prepare(config.data)
with Loader(prepared, context_length=1024, micro_batch_size=4, rows_per_step=16) as loader:
    for step in loader: …
"""

from mai_thinking.data.loader import Loader, Step
from mai_thinking.data.preparation import prepare
from mai_thinking.data.prepared import PreparedData

__all__ = ["Loader", "PreparedData", "Step", "prepare"]
