"""Expert load at initialisation, attention's output gains ordinary or zero (MAI-Thinking-1 report Fig. 8)."""

import torch

from mai_thinking.bench.learner import loading
from mai_thinking.bench.machine import Options
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure
from mai_thinking.bench.train import CONFIG
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import prepare
from mai_thinking.training.model_files import build_model, model_config

SEEDS = 5


def measure(options: Options) -> Result:
    """The highest violation rate (max load / mean load − 1) over the MoE layers, on one batch of real text."""
    shape = "batch={context_length: 512, global_batch_size: 32, micro_batch_size: 32}"
    config = load_config(PretrainConfig, CONFIG, [shape])
    data = prepare(config.data)
    with loading(config, data) as loader:
        batch = next(loader).micro_batches[0]
    rows = []
    for spread in (0.02, config.model["initializer_range"]):
        highest: dict[str, Figure] = {}
        for name, zero in (("ordinary gains", False), ("zero gains", True)):
            worst = []
            for seed in range(SEEDS):
                changes = {"zero_init_attention": zero, "initializer_range": spread}
                run = config.model_copy(update={"seed": seed, "model": config.model | changes})
                model = build_model(run, model_config(run, data.tokenizer)).eval()
                with torch.no_grad():
                    ids, positions = batch["input_ids"], batch["position_ids"]
                    counts = model(ids, position_ids=positions, use_cache=False, output_routing=True).routing.counts_E
                worst.append(float((counts.amax(-1) / counts.mean(-1) - 1).max()))
            highest[name] = Figure.of(worst, "violation")
        rows.append(Row({"initial weights": f"N(0, {spread})"}, highest))
    return Result("zero-start", rows, [f"16,384 tokens, {SEEDS} seeds"])
