"""configs/L12.yaml, the report's smallest rung, on one GPU: with our kernels and with the library's.

Model and optimiser are the same for all sides; only how the layers are computed changes. Rows are packed documents of
the embedded text. Utilisation is the report's (§2.8): matrix products and attention, without recomputation, over the
whole step's time; attention counts the pairs of tokens that documents and windows leave. It is a share of what a large
bf16 product reached on the same card in the same run.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from mai_thinking.bench.learner import BenchLearner, loading
from mai_thinking.bench.machine import Options
from mai_thinking.bench.profile import gpu_profile_rows
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import Batch, PreparedData, prepare
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.configuration import LOCAL
from mai_thinking.model.experts import CastExperts
from mai_thinking.training.parallel import compile_layers

CONFIG = "configs/L12.yaml"
ROUNDED_GROUPED_MM = "rounded_grouped_mm"
"""The library's grouped product in bf16; by itself it computes in the weights' dtype, fp32 under autocast."""


def _rounded_grouped_mm(module: Any, x_TL: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    weights = (weight.to(torch.bfloat16) for weight in (module.gate_up_proj, module.down_proj))
    out: torch.Tensor = grouped_mm_experts_forward(CastExperts(module, *weights), x_TL.to(torch.bfloat16), *routing)
    return out


ALL_EXPERTS_FUNCTIONS.register(ROUNDED_GROUPED_MM, _rounded_grouped_mm)


@dataclass(frozen=True)
class Side:
    """A way to compute the layers."""

    attention: str
    experts: str
    compiled: bool
    micro_batch_size: int | None = None
    """Null: the config's. What is not compiled keeps more for its backward pass."""
    rows: int | None = None
    """In a step. Null: the config's. Fewer will do for those that take long."""


SIDES = {
    "ours": Side("packed_flex", "bucketed_mm", compiled=True),
    "ours, flash attention": Side("windowed_sdpa", "bucketed_mm", compiled=True),
    "ours, not compiled": Side("windowed_sdpa", "bucketed_mm", compiled=False, micro_batch_size=8, rows=48),
    "transformers": Side("sdpa", ROUNDED_GROUPED_MM, compiled=False, micro_batch_size=4, rows=48),
    "transformers, compiled": Side("sdpa", ROUNDED_GROUPED_MM, compiled=True, micro_batch_size=8, rows=48),
}


def measure(options: Options) -> Result:
    """configs/L12.yaml, fresh weights; `options.rounds` steps a side."""
    if not torch.cuda.is_available():
        raise UsageError("card: there is no GPU here; `bench.py train` measures a step of nano on a CPU")
    config = load_config(PretrainConfig, CONFIG)
    return compare(config, prepare(config.data), options)


def compare(config: PretrainConfig, data: PreparedData, options: Options, sides: dict[str, Side] = SIDES) -> Result:
    """Every side in turn, each with its warm-up. One that runs out of memory says so."""
    product = product_rate()
    with torch.device("cuda"):  # where drawing 3.7 billion weights takes a moment
        learner = BenchLearner(config, data)
    rows, notes = [], [f"product: {product / 1e12:.0f} TFLOP/s, bf16, 8,192 × 8,192 × 8,192"]
    for name, side in sides.items():
        row, said = _side(name, side, learner, config, data, product, options.rounds)
        rows += row
        notes += said
    return Result("card", rows, notes)


def _side(
    name: str, side: Side, learner: BenchLearner, config: PretrainConfig, data: PreparedData, product: float, steps: int
) -> tuple[list[Row], list[str]]:
    _compute_as(learner, side)
    micro = side.micro_batch_size or config.batch.micro_batch_size
    rows = side.rows or config.batch.global_batch_size
    batch = config.batch.model_copy(update={"micro_batch_size": micro, "global_batch_size": rows})
    with loading(config.model_copy(update={"batch": batch}), data) as loader:
        batches = [next(loader) for _ in range(2)]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        begin = time.perf_counter()
        for number in range(2):
            learner.learn(batches[number])
        torch.cuda.synchronize()
        warm_up = time.perf_counter() - begin
        seconds = [_timed(lambda number=number: learner.learn(batches[number % 2])) for number in range(steps)]  # type: ignore[misc]
    except torch.cuda.OutOfMemoryError as error:
        learner.optimizer.zero_grad()
        return [], [f"{name}: out of memory in micro-batches of {micro} rows ({str(error).splitlines()[0][:120]})"]
    tokens = batch.tokens_per_step
    architecture = learner.unwrap().config
    flops = [step_flops(architecture, batches[number % 2]) for number in range(steps)]
    row = Row(
        {"side": name, "rows at once": micro},
        {
            "step": Figure.of((1e3 * s for s in seconds), "ms"),
            "rate": Figure.of((tokens / s for s in seconds), "tokens/s"),
            "MFU": Figure.of((100.0 * f / s / product for f, s in zip(flops, seconds, strict=True)), "%"),
            "memory": Figure.of([torch.cuda.max_memory_allocated() / 2**30], "GiB"),
            "warm-up": Figure.of([warm_up], "s"),
        },
    )
    shares = gpu_profile_rows(lambda: learner.learn(batches[0])) if name == "ours" else []
    return [row, *shares], []


def _compute_as(learner: BenchLearner, side: Side) -> None:
    model = learner.unwrap()
    model.set_attn_implementation(side.attention)
    model.set_experts_implementation(side.experts)
    for layer in model.model.layers:
        layer._compiled_call_impl = None
    if side.compiled:
        compile_layers(model)


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
    out = torch.empty_like(a)
    for _ in range(5):
        torch.mm(a, b, out=out)
    seconds = sorted(_timed(lambda: torch.mm(a, b, out=out)) for _ in range(rounds))
    return 2.0 * size**3 / seconds[rounds // 2]


def _timed(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
