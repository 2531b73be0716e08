"""Expert load at initialisation, attention's output gains ordinary or zero (MAI-Thinking-1 report Fig. 8)."""

from pathlib import Path

import torch

from mai_thinking.bench.measure import Figure, Result, Row
from mai_thinking.bench.train import CONFIG
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import prepare
from mai_thinking.recipes.pretrain import make_loader
from mai_thinking.training.model_files import build_model, model_config

SEEDS = 5


def measure(model: Path, rounds: int) -> Result:
    """The highest violation rate (max load / mean load − 1) over the MoE layers, on one batch of real text."""
    shape = "batch={context_length: 512, global_batch_size: 32, micro_batch_size: 32}"
    config = load_config(PretrainConfig, CONFIG, [shape])
    data = prepare(config.data)
    with make_loader(config, data) as loader:
        batch = next(loader).micro_batches[0]
    rows = []
    for spread in (0.02, config.model["initializer_range"]):
        highest = {}
        for name, zero in (("ordinary gains", False), ("zero gains", True)):
            changes = {"zero_init_attention": zero, "initializer_range": spread}
            worst = []
            for seed in range(SEEDS):
                run = config.model_copy(update={"seed": seed, "model": config.model | changes})
                fresh = build_model(run, model_config(run, data.tokenizer)).eval()
                with torch.no_grad():
                    ids, positions = batch["input_ids"], batch["position_ids"]
                    counts = fresh(ids, position_ids=positions, use_cache=False, output_routing=True).routing.counts_E
                worst.append(float((counts.amax(-1) / counts.mean(-1) - 1).max()))
            highest[name] = Figure.of(worst, "violation")
        rows.append(Row({"initial weights": f"N(0, {spread})"}, highest))
    return Result(rows, [f"16,384 tokens, {SEEDS} seeds"])
