"""What a run will cost, before it costs anything: `--dry-run`."""

import os

import torch

from mai_thinking.config.run import PlanSection, TextTrainingConfig
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.loss import CHUNK_ELEMENTS

WEIGHT, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes per parameter: fp32 weights, fp32 gradients, AdamW's two fp32 moments (REPORT §1: fp32 always)."""


def memory_per_rank(
    architecture: MaiThinkingConfig,
    plan: PlanSection,
    *,
    gpus: int,
    tokens: int,
    step_tokens: int,
    compute_bytes: int,
    activation_checkpointing: bool,
) -> dict[str, float]:
    """Bytes by use, of one rank that takes micro-batches of `tokens` tokens through the model, `step_tokens` in a step.

    Experts are split over `plan.expert_parallel` ranks, all else is on each of `gpus` ranks; what the ZeRO stage
    shards is split over the ranks that hold the same weights. Activations are an estimate: what each sublayer keeps
    for its backward pass at `compute_bytes` a number, or with checkpointing the fp32 residual stream at each layer of
    the whole step, which waits for one backward pass (see `Learner`), with each micro-batch's gradient of the head,
    and one layer's full set. In half precision the experts' weights are held rounded too. The framework's own memory
    and fragmentation are not in it.
    """
    total, _ = architecture.parameter_counts()
    experts = architecture.parameter_breakdown()["experts"]
    # (parameters held, ranks that hold the same ones)
    shares = [(total - experts, gpus), (experts / plan.expert_parallel, gpus / plan.expert_parallel)]

    def held(bytes_each: int, sharded_from_stage: int) -> float:
        return sum(
            bytes_each * parameters / (copies if plan.zero_stage >= sharded_from_stage else 1)
            for parameters, copies in shares
        )

    per_layer = _activations_per_token(architecture, compute_bytes)
    layers = architecture.num_hidden_layers
    kept = 0.0
    if activation_checkpointing:
        heads = 4 * architecture.vocab_size * architecture.hidden_size * (step_tokens / tokens)
        kept = step_tokens * 4 * architecture.hidden_size * layers + tokens * max(per_layer) + heads
    return {
        "weights": held(WEIGHT, 3),
        "rounded": 2 * experts / plan.expert_parallel if compute_bytes == 2 else 0.0,
        "gradients": held(GRADIENT, 2),
        "optimiser": held(MOMENTS, 1),
        "activations": kept or tokens * sum(per_layer),
        "logits": 2 * 4 * min(CHUNK_ELEMENTS["cuda"], tokens * architecture.vocab_size),
    }


def _activations_per_token(architecture: MaiThinkingConfig, compute_bytes: int) -> list[float]:
    """Bytes that each layer keeps for one token."""
    c = architecture
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norms = 4 * 4 * c.hidden_size  # fp32 inputs of the four norms
    attention = compute_bytes * (2 * c.hidden_size + queries) + 4 * 2 * (queries + keys) + compute_bytes * 2 * keys
    dense = compute_bytes * (2 * c.hidden_size + 4 * c.intermediate_size)
    # Gate and up, and the output where it is kept; all else is computed again (`model.experts`, `grouped_experts`).
    per_choice = compute_bytes * (c.latent_size + 2 * c.moe_intermediate_size)
    moe = (
        compute_bytes * 2 * (c.hidden_size + c.latent_size) + 4 * 3 * c.num_experts + c.num_experts_per_tok * per_choice
    )
    return [norms + attention + (moe if layer in c.moe_layers else dense) for layer in range(c.num_hidden_layers)]


def plan_text(config: TextTrainingConfig, architecture: MaiThinkingConfig) -> str:
    """The lines that `--dry-run` prints, reckoned with the ranks of `config.plan`, or those that the launcher gives."""
    batch, plan = config.batch, config.plan
    ranks = plan.gpus or int(os.environ.get("WORLD_SIZE", "1"))
    bf16 = config.execution.precision == "bf16" or (
        config.execution.precision == "auto" and (torch.cuda.is_available() or plan.gpus is not None)
    )
    memory = memory_per_rank(
        architecture,
        plan,
        gpus=ranks,
        tokens=batch.micro_batch_size * batch.context_length,
        step_tokens=max(batch.micro_batch_size, batch.global_batch_size // ranks) * batch.context_length,
        compute_bytes=2 if bf16 else 4,
        activation_checkpointing=config.execution.activation_checkpointing,
    )
    total, active = architecture.parameter_counts()
    flops = architecture.flops_per_token(batch.context_length)
    tokens = config.steps * batch.tokens_per_step
    rows = [
        ("parameters", f"{quantity(total)} total, {quantity(active)} active ({total:,} / {active:,})"),
        ("FLOPs", f"{quantity(flops)} a token, {quantity(flops * tokens)} in all"),
        (
            "tokens",
            f"{quantity(tokens)} = {config.steps:,} steps of {batch.global_batch_size:,} rows of "
            f"{batch.context_length:,}; {tokens / active:.2f} per active parameter",
        ),
        (
            "ranks",
            f"{ranks:,} ({ranks // plan.expert_parallel:,} data-parallel copies of the experts, "
            f"each over {plan.expert_parallel} ranks; ZeRO stage {plan.zero_stage})",
        ),
        ("memory", f"{sum(memory.values()) / 2**30:,.2f} GiB per rank"),
        *((f"  {use}", f"{size / 2**30:,.2f} GiB") for use, size in memory.items()),
    ]
    return "\n".join(f"{name:<12}  {value}" for name, value in rows)


def quantity(value: float) -> str:
    """`962.1B`, `34.66B`, `1.66M`: four digits and a letter."""
    for power, letter in reversed(list(enumerate("kMBTPEZY", start=1))):
        if value >= 1000**power:
            return f"{value / 1000**power:.4g}{letter}"
    return f"{value:.4g}"
