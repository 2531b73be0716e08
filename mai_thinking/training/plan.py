"""What a run will cost, before it costs anything: `--dry-run`. Memory, what ranks send, and the time of a step:

    time of a step  =  compute + what all-to-alls, gathering and reducing take longer than what they run beside

Computation runs at the rate that L12 was measured at on one card. Rows of experts travel beside the experts' products,
but for one group's (`model.expert_parallel`). FSDP's gathering and reducing runs beside all of a step's computation,
DDP's reduction beside the backward pass of the last micro-batch, and neither while rows travel. Links are those of
nodes of eight H100, full and not shared with others; a collective crosses between nodes once a node, each card carrying
its part. Routing is even. So it is a bound for this code, not a promise.
"""

import os
from typing import NamedTuple

import torch

from mai_thinking.config.run import ExecutionSection, TextTrainingConfig
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.model.expert_parallel import GROUPS
from mai_thinking.model.loss import CHUNK_ELEMENTS

WEIGHT, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes per parameter: fp32 weights, fp32 gradients, AdamW's two fp32 moments (REPORT §1: fp32 always)."""
PEAK = 989e12
"""FLOP/s of a card's dense bf16 products, by its data sheet."""
MEASURED = 0.409 * 766e12
"""FLOP/s of a step of L12 on one card (results/bench)."""
WITHIN, BETWEEN = 450e9, 50e9
"""Bytes/s a card sends to others of its node (NVLink 4), and to other nodes (400 Gb/s)."""
NODE = 8
"""Cards of a node."""
Flow = dict[str, float]
"""Bytes that a rank sends in a step: `within` its node and `between` nodes."""


class Work(NamedTuple):
    """A step's work as one rank sees it: tokens in a micro-batch, its tokens of a step, bytes of a number in the
    layers."""

    ranks: int
    tokens: int
    step_tokens: int
    compute_bytes: int


def memory_per_rank(architecture: MaiThinkingConfig, execution: ExecutionSection, work: Work) -> dict[str, float]:
    """Bytes by use, of one rank, as `execution` divides the model.

    `working` is what weights are computed from beside those that the optimiser has: experts rounded once for a step
    (DDP), or the layer that is gathered and the next one (FSDP), with the gradient of one before it is reduced.
    Activations are an estimate: what each sublayer keeps for its backward pass, or with checkpointing the fp32 residual
    stream at each layer of the whole step (see `Learner`), with each micro-batch's gradient of the head, and one
    layer's full set. The framework's own memory and fragmentation are not in it.
    """
    parts, sharded = architecture.parameter_breakdown(), execution.parallel == "fsdp" and work.ranks > 1
    total, _ = architecture.parameter_counts()
    experts = parts["experts"] / execution.expert_parallel
    dense = float(total - parts["experts"])
    copies = work.ranks / execution.expert_parallel
    held = dense / work.ranks + experts / copies if sharded else dense + experts
    layers = architecture.num_hidden_layers
    of_layer, cast = experts / max(1, len(architecture.moe_layers)), work.compute_bytes
    of_layer_dense, root = (dense - parts["embeddings"]) / layers, parts["embeddings"]
    if sharded:
        gathered = 2 * (cast * of_layer + WEIGHT * of_layer_dense) + WEIGHT * root
        working = gathered + (cast + GRADIENT) * of_layer + 2 * GRADIENT * max(of_layer_dense, root)
    elif execution.expert_parallel > 1:
        working = cast * experts + (cast + GRADIENT) * of_layer
    else:
        working = 2 * experts if cast == 2 else 0.0
    per_layer = _activations_per_token(
        architecture, cast, divided=execution.expert_parallel > 1, compiled=execution.compile
    )
    kept = work.tokens * sum(per_layer)
    if execution.activation_checkpointing:
        heads = GRADIENT * architecture.vocab_size * architecture.hidden_size * (work.step_tokens / work.tokens)
        residual = 4 * architecture.hidden_size * layers
        kept = work.step_tokens * residual + work.tokens * max(per_layer) + heads
    return {
        "weights": WEIGHT * held,
        "gradients": GRADIENT * held,
        "optimiser": MOMENTS * held,
        "working": working,
        "activations": kept,
        "logits": 2 * 4 * min(CHUNK_ELEMENTS["cuda"], work.tokens * architecture.vocab_size),
    }


def _activations_per_token(
    architecture: MaiThinkingConfig, compute_bytes: int, *, divided: bool, compiled: bool
) -> list[float]:
    """Bytes that each layer keeps for one token; `divided`: with experts on other ranks. `compiled`, what sublayers,
    queries and keys were before their norms is kept as it came and not in fp32."""
    c = architecture
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # Inputs of the four norms, of which two are the fp32 residual stream; of queries' and keys' norms, and of RoPE.
    norms = (2 * 4 + 2 * (compute_bytes if compiled else 4)) * c.hidden_size
    turned = (compute_bytes if compiled else 4 * 2) * (queries + keys)
    attention = compute_bytes * (2 * c.hidden_size + queries) + turned + compute_bytes * 2 * keys
    dense = compute_bytes * (2 * c.hidden_size + 4 * c.intermediate_size)
    # Gate and up, and in fp32 the output (`model.experts`, `grouped_experts`); rows that have travelled are kept where
    # they arrive, there and back.
    latents = (compute_bytes > 2) + 2 * divided
    per_choice = compute_bytes * (latents * c.latent_size + 2 * c.moe_intermediate_size)
    moe = (
        compute_bytes * 2 * (c.hidden_size + c.latent_size) + 4 * 3 * c.num_experts + c.num_experts_per_tok * per_choice
    )
    return [norms + attention + (moe if layer in c.moe_layers else dense) for layer in range(c.num_hidden_layers)]


def computes_in_bf16(execution: ExecutionSection, gpus: int | None) -> bool:
    """Whether a run does, or on `gpus` would."""
    on_gpu = torch.cuda.is_available() or gpus is not None
    return execution.precision == "bf16" or (execution.precision == "auto" and on_gpu)


def work_of(config: TextTrainingConfig, ranks: int) -> Work:
    """What one of `ranks` does in a step."""
    batch = config.batch
    rows = max(1, batch.global_batch_size // ranks)
    return Work(
        ranks,
        tokens=min(batch.micro_batch_size, rows) * batch.context_length,
        step_tokens=rows * batch.context_length,
        compute_bytes=2 if computes_in_bf16(config.execution, config.plan.gpus) else 4,
    )


def plan_text(config: TextTrainingConfig, architecture: MaiThinkingConfig) -> str:
    """The lines that `--dry-run` prints, reckoned with the ranks of `config.plan`, or those that the launcher gives."""
    batch, plan, execution = config.batch, config.plan, config.execution
    ranks = plan.gpus or int(os.environ.get("WORLD_SIZE", "1"))
    work = work_of(config, ranks)
    memory = memory_per_rank(architecture, execution, work)
    total, active = architecture.parameter_counts()
    flops = architecture.flops_per_token(batch.context_length)
    tokens = config.steps * batch.tokens_per_step
    lines = [
        ("parameters", f"{quantity(total)} total, {quantity(active)} active ({total:,} / {active:,})"),
        ("FLOPs", f"{quantity(flops)} a token, {quantity(flops * tokens)} in all"),
        (
            "tokens",
            f"{quantity(tokens)} = {config.steps:,} steps of {batch.global_batch_size:,} rows of "
            f"{batch.context_length:,}; {tokens / active:.2f} per active parameter",
        ),
        ("ranks", layout_text(ranks, execution)),
        *memory_rows(memory, plan.gpus and plan.gigabytes),
    ]
    if plan.gpus is not None:
        lines += prediction_rows(architecture, execution, work, flops)
    return "\n".join(f"{name:<12}  {value}" for name, value in lines)


def layout_text(ranks: int, execution: ExecutionSection) -> str:
    """Who holds what."""
    copies = ranks // execution.expert_parallel
    how = "sharded (FSDP)" if execution.parallel == "fsdp" and ranks > 1 else "whole on each (DDP)"
    if execution.expert_parallel == 1 or ranks == 1:
        return f"{ranks:,}, the model {how}"
    what = "sharded over" if execution.parallel == "fsdp" else "whole on each of"
    return (
        f"{ranks:,}, the dense part {how}; experts over {execution.expert_parallel} ranks, each share {what} "
        f"{copies:,} rank{'s' * (copies > 1)}"
    )


def memory_rows(memory: dict[str, float], gigabytes: float | None) -> list[tuple[str, str]]:
    """The lines about it; `gigabytes` (10⁹ bytes) is what a rank has."""
    whole = sum(memory.values())
    fits = "" if not gigabytes else f", {100 * whole / (gigabytes * 1e9):.0f} % of {gigabytes:g} GB"
    uses = [(f"  {use}", f"{size / 2**30:,.2f} GiB") for use, size in memory.items()]
    return [("memory", f"{whole / 2**30:,.2f} GiB per rank{fits}"), *uses]


def quantity(value: float) -> str:
    """`962.1B`, `34.66B`, `1.66M`: four digits and a letter."""
    for power, letter in reversed(list(enumerate("kMBTPEZY", start=1))):
        if value >= 1000**power:
            return f"{value / 1000**power:.4g}{letter}"
    return f"{value:.4g}"


def traffic(architecture: MaiThinkingConfig, execution: ExecutionSection, work: Work) -> dict[str, Flow]:
    """By use, over a step's micro-batches. Weights of experts travel as they are computed with, all else in fp32."""
    parts, total = architecture.parameter_breakdown(), architecture.parameter_counts()[0]
    ranks, divided = work.ranks, execution.expert_parallel
    passes = work.step_tokens / work.tokens
    experts, dense, cast = parts["experts"] / divided, total - parts["experts"], work.compute_bytes
    # Of the ranks that have the same experts, so many are on one node; neighbours divide them.
    copies, neighbours = ranks // divided, max(1, min(NODE, ranks) // divided)
    if execution.parallel == "fsdp":
        # Gathered for the forward pass and for the backward; the embeddings and the head's, once for both.
        forth = passes * (4 * (2 * dense - parts["embeddings"]))
        flows = {
            "dense: gather": _collective(forth, ranks, min(NODE, ranks)),
            "dense: reduce": _collective(passes * 4 * dense, ranks, min(NODE, ranks)),
            "experts: gather": _collective(passes * 2 * cast * experts, copies, neighbours),
            "experts: reduce": _collective(passes * 4 * experts, copies, neighbours),
        }
    else:
        flows = {
            "dense: reduce": _collective(2 * 4 * dense, ranks, min(NODE, ranks)),
            "experts: reduce": _collective(2 * 4 * experts, copies, neighbours),
        }
    # There and back, forward and backward, and once more where the forward pass is computed again.
    journeys = 6 if execution.activation_checkpointing else 4
    rows = work.step_tokens * architecture.num_experts_per_tok * len(architecture.moe_layers)
    sent = journeys * rows * architecture.latent_size * cast
    elsewhere = max(0, divided - NODE) / divided
    flows["experts: rows"] = {"within": sent * (min(divided, NODE) - 1) / divided, "between": sent * elsewhere}
    return {use: flow for use, flow in flows.items() if sum(flow.values())}


def _collective(size: float, ranks: int, on_node: int) -> Flow:
    """A rank's part in gathering, or scattering the sums of, `size` bytes over `ranks`, `on_node` of which are on each
    node."""
    nodes = max(1, ranks // on_node)
    return {"within": size * (on_node - 1) / on_node, "between": size / on_node * (nodes - 1) / nodes}


def step_seconds(
    architecture: MaiThinkingConfig, execution: ExecutionSection, work: Work, flops_per_token: float
) -> dict[str, float]:
    """Seconds of a step by what they go into: `compute`, and beside nothing else `rows` that travel and `waiting` for
    gathers and reductions."""
    again = 4 / 3 if execution.activation_checkpointing else 1.0
    compute = again * work.step_tokens * flops_per_token / MEASURED
    flows = traffic(architecture, execution, work)
    rows = _seconds(flows.pop("experts: rows", {}))
    products = compute * 6 * architecture.parameter_breakdown()["active_experts"] / flops_per_token
    groups = min(GROUPS, architecture.num_experts // execution.expert_parallel)
    beside_products = min(rows * (1 - 1 / groups), products)
    beside = compute if execution.parallel == "fsdp" else compute * 2 / 3 * work.tokens / work.step_tokens
    waiting = max(0.0, sum(map(_seconds, flows.values())) + beside_products - beside)
    return {"compute": compute, "rows": rows - beside_products, "waiting": waiting}


def _seconds(flow: Flow) -> float:
    """Both kinds of links are at work at once."""
    return max(flow.get("within", 0.0) / WITHIN, flow.get("between", 0.0) / BETWEEN)


def prediction_rows(
    architecture: MaiThinkingConfig, execution: ExecutionSection, work: Work, flops_per_token: float
) -> list[tuple[str, str]]:
    """The lines of `--dry-run` about it."""
    flows = traffic(architecture, execution, work)
    seconds = step_seconds(architecture, execution, work, flops_per_token)
    whole = sum(seconds.values())
    mfu = work.step_tokens * flops_per_token / whole / PEAK
    sums = {link: sum(flow[link] for flow in flows.values()) / 1e9 for link in ("within", "between")}
    return [
        ("sends", f"{sums['within']:,.1f} GB a rank and step within a node, {sums['between']:,.1f} GB between nodes"),
        *((f"  {use}", f"{f['within'] / 1e9:,.1f} GB, {f['between'] / 1e9:,.1f} GB") for use, f in flows.items()),
        ("a step", ", ".join(f"{value:.2f} s {name}" for name, value in seconds.items()) + f": {whole:.2f} s"),
        ("utilisation", f"{100 * mfu:.1f} % of {PEAK / 1e12:.0f} TFLOP/s, as `training.plan` models it"),
    ]
