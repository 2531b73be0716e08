"""What ranks send each other in a step, over which links, and the utilisation that this leaves: a model on paper.

    time of a step  =  compute + all-to-all + what gathering and reducing take longer than what they run beside

Computation runs at the rate that L12 was measured at on one card. Rows of experts travel while nothing else is done,
which is how `model.expert_parallel` is written. FSDP's gathering and reducing runs beside all of a step's computation,
DDP's reduction beside the backward pass of the last micro-batch. Messages are large enough for their links, no link is
shared with others, and routing is even. So it is a bound for this code, not a promise.

Links are of a node of eight H100. A collective of ranks on several nodes crosses between nodes once a node, each card
carrying its part.
"""

from dataclasses import dataclass

from mai_thinking.config.run import ExecutionSection
from mai_thinking.model import MaiThinkingConfig

PEAK = 989e12
"""FLOP/s of a card's dense bf16 products, by its data sheet."""
MEASURED = 0.380 * 799e12
"""FLOP/s of a step of L12 on one card (results/bench)."""
WITHIN, BETWEEN = 450e9, 50e9
"""Bytes/s a card sends to others of its node (NVLink 4), and to other nodes (400 Gb/s)."""
NODE = 8
"""Cards of a node."""
Flow = dict[str, float]
"""Bytes that a rank sends in a step: `within` its node and `between` nodes."""


@dataclass(frozen=True)
class Work:
    """A step's work as one rank sees it."""

    ranks: int
    tokens: int
    """In a micro-batch."""
    step_tokens: int
    """Of this rank."""
    compute_bytes: int
    """Of a number in the layers."""


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
    """Seconds of a step by what they go into: `compute`, `rows` that travel, `waiting` for gathers and reductions."""
    again = 4 / 3 if execution.activation_checkpointing else 1.0
    compute = again * work.step_tokens * flops_per_token / MEASURED
    flows = traffic(architecture, execution, work)
    rows = _seconds(flows.pop("experts: rows", {}))
    beside = compute if execution.parallel == "fsdp" else compute * 2 / 3 * work.tokens / work.step_tokens
    return {"compute": compute, "rows": rows, "waiting": max(0.0, sum(map(_seconds, flows.values())) - beside)}


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
        ("utilisation", f"{100 * mfu:.1f} % of {PEAK / 1e12:.0f} TFLOP/s, as `training.traffic` models it"),
    ]
