"""configs/L12.yaml, the report's smallest rung, on one GPU: with our kernels and with the library's.

Only how the layers are computed changes. Rows are packed documents of the embedded text. Utilisation is the report's
(§2.8): matrix products and attention, without recomputation, over the whole step's time; attention counts the pairs of
tokens that documents and windows leave. It is a share of what a large bf16 product reached on the same card.
"""

import gc
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from mai_thinking.bench.learner import BenchLearner
from mai_thinking.bench.measure import Figure, Result, Row, alternate, milliseconds, profile_rows
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import Batch, PreparedData, prepare
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.configuration import LOCAL
from mai_thinking.model.experts import CastExperts
from mai_thinking.recipes.pretrain import make_loader
from mai_thinking.training.model_files import model_config

CONFIG = "configs/L12.yaml"


def _rounded_grouped_mm(module: Any, x_TL: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    """The library's grouped product in bf16; by itself it computes in the weights' dtype, fp32 under autocast."""
    weights = (weight.to(torch.bfloat16) for weight in (module.gate_up_proj, module.down_proj))
    out: torch.Tensor = grouped_mm_experts_forward(CastExperts(module, *weights), x_TL.to(torch.bfloat16), *routing)
    return out


ALL_EXPERTS_FUNCTIONS.register("rounded_grouped_mm", _rounded_grouped_mm)
_FLASH, _PLAIN, _FEWER = "execution.attention=windowed_sdpa", "execution.compile=false", "batch.global_batch_size=48"
_LIBRARY = ("execution.attention=sdpa", "execution.experts=rounded_grouped_mm", _FEWER)
SIDES: dict[str, Sequence[str]] = {
    "ours": (),
    "ours, flash attention": (_FLASH,),
    # What is not compiled keeps more for its backward pass.
    "ours, not compiled": (_FLASH, _PLAIN, _FEWER, "batch.micro_batch_size=8"),
    "transformers": (*_LIBRARY, _PLAIN, "batch.micro_batch_size=4"),
    "transformers, compiled": (*_LIBRARY, "batch.micro_batch_size=8"),
}


def measure(model: Path, rounds: int) -> Result:
    """Every side in turn, with fresh weights and its own warm-up; `rounds` steps each."""
    if not torch.cuda.is_available():
        raise UsageError("card: there is no GPU here; `bench.py train` measures a step of nano on a CPU")
    data = prepare(load_config(PretrainConfig, CONFIG).data)
    product = product_rate()
    result = Result([], [f"product: {product / 1e12:.0f} TFLOP/s, bf16, 8,192 × 8,192 × 8,192"])
    for side, changes in SIDES.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            result.rows.extend(_steps(side, load_config(PretrainConfig, CONFIG, changes), data, product, rounds))
        except torch.cuda.OutOfMemoryError as error:
            result.notes.append(f"{side}: out of memory ({str(error).splitlines()[0][:120]})")
    return result


def _steps(side: str, config: PretrainConfig, data: PreparedData, product: float, rounds: int) -> list[Row]:
    architecture = model_config(config, data.tokenizer)
    with torch.device("cuda"):  # where drawing 3.7 billion weights takes a moment
        learner = BenchLearner(config, architecture)
    with make_loader(config, data) as loader:
        batches = itertools.cycle([next(loader) for _ in range(2)])

    def step() -> float:
        batch = next(batches)
        learner.learn(batch.micro_batches)
        return step_flops(architecture, batch)

    warm_up = sum(turn.seconds for turn in alternate({side: step}, rounds=2, warmup=0)[side])
    turns = alternate({side: step}, rounds=rounds, warmup=0)[side]
    row = Row(
        {"side": side, "rows at once": config.batch.micro_batch_size},
        {
            "step": milliseconds(turns),
            "rate": Figure.of((config.batch.tokens_per_step / turn.seconds for turn in turns), "tokens/s"),
            "MFU": Figure.of((100.0 * turn.amount / turn.seconds / product for turn in turns), "%"),
            "memory": Figure.of([torch.cuda.max_memory_allocated() / 2**30], "GiB"),
            "warm-up": Figure.of([warm_up], "s"),
        },
    )
    return [row, *(profile_rows(step) if side == "ours" else [])]


def step_flops(architecture: MaiThinkingConfig, batch: Batch) -> float:
    """FLOPs of a training step on `batch`, by the report's rule."""
    tokens, attended = 0, 0.0
    for rows in batch.micro_batches:
        seen_BT = rows["position_ids"] + 1  # keys of a global layer's query: its document's tokens so far
        tokens += seen_BT.numel()
        for kind in architecture.layer_types or []:
            attended += float((seen_BT.clamp(max=architecture.sliding_window) if kind == LOCAL else seen_BT).sum())
    return architecture.training_flops(tokens, attended)


def product_rate(size: int = 8192, rounds: int = 20) -> float:
    """FLOP/s of a bf16 product of random square matrices: the median."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    turns = alternate({"product": lambda: float((a @ b).size(0))}, rounds=rounds, warmup=5)["product"]
    return 2.0 * size**3 / (1e-3 * milliseconds(turns).median)
