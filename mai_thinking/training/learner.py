"""A model in training, and one update of its weights: count, accumulate, reduce, clip, guard, step.

Losses are normalised by counts over the *global* batch, so that how it is cut into ranks and micro-batches does not
change what is learned. The balance loss takes expert frequencies over the global batch too (MAI-Thinking-1 report
§2.1): exactly over ranks. Over micro-batches it has three modes:

- Where the experts are known beforehand, as in RL (replay), exactly.
- With activation checkpointing, exactly. All micro-batches go forward first, keeping little more than each layer's
  input, and one backward follows when all counts are known. This costs no arithmetic beyond the checkpointing's own.
- Otherwise by running counts: micro-batch i is balanced against the counts of micro-batches 1 … i. Waiting for the rest
  would mean to keep every graph, which is what accumulation is there to avoid.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mai_thinking.config.run import OptimizerSection, TrainingConfig
from mai_thinking.errors import RunError, UsageError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.model.latent_moe import Routing, balance_loss, rounded_once
from mai_thinking.training.muon import MuonAdamW
from mai_thinking.training.parallel import (
    apply_compile_and_checkpointing,
    clip_gradients,
    divides,
    mesh_of,
    parallelize,
)
from mai_thinking.training.state import ModelState, OptimizerState

T = TypeVar("T")


class Counts(NamedTuple):
    """Of a global batch, for the router losses: real tokens, which the routing's sums run over; how often each expert
    is chosen, where that is known before the forward pass; and whether there is anything to learn. Where not, no
    weight changes: router losses, decay and momentum neither."""

    tokens: float
    experts_ME: Tensor | None
    signal: bool = True


class Loss(Protocol):
    """What a recipe minimises besides the router losses."""

    advice: str
    """What helps when it is not finite."""

    def count(self, micro_batches: Sequence[Any], learner: "Learner") -> Counts:
        """Counts over the global batch, before its first forward pass. Collective."""

    def forward(self, micro_batch: Any, learner: "Learner") -> tuple[Tensor, Routing, Any]:
        """One micro-batch through `learner.model`: its share of the global batch's loss, divided by what was counted,
        with the graph; its routing; and what `metrics` needs of it, without the graph."""

    def metrics(self, parts: list[Any], learner: "Learner") -> dict[str, float]:
        """Over the global batch, of this rank's micro-batches' `parts`; `loss` is among them. Collective."""


MicroBatch = dict[str, Tensor]
"""[B, T] int64 `input_ids`, `labels` (next tokens, -100 for none) and `position_ids`; and, where there is padding,
[B, T] bool `token_mask` that is false there. Of RL: see `rl.packing.pack`."""


class TextLoss:
    """Cross-entropy of next tokens: nats per label of the global batch. One object serves one run."""

    advice = "Lower the learning rate, or start again from the newest checkpoint with another seed"

    def count(self, micro_batches: Sequence[MicroBatch], learner: "Learner") -> Counts:
        """Labels for the cross-entropy, tokens for the routers."""
        labels = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
        tokens = sum(int(batch.get("token_mask", torch.ones_like(batch["labels"])).sum()) for batch in micro_batches)
        sums = learner.sum(torch.tensor([labels, tokens], dtype=torch.float64, device=learner.device))
        self._labels = sums[0].float()
        return Counts(float(sums[1]), None)

    def forward(self, micro_batch: MicroBatch, learner: "Learner") -> tuple[Tensor, Routing, Tensor]:
        """Through the model, which computes the loss without holding all logits."""
        batch = {name: learner.moved(tensor) for name, tensor in micro_batch.items()}
        with learner.accelerator.autocast():
            output = learner.model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                shift_labels=batch["labels"],
                token_mask=batch.get("token_mask"),
                num_items_in_batch=self._labels,
                skip_logits=True,
                use_cache=False,
                output_router_logits=False,
                output_routing=True,
            )
        return output.loss, output.routing, output.loss.detach()

    def metrics(self, parts: list[Tensor], learner: "Learner") -> dict[str, float]:
        """`loss`: cross-entropy per label, in nats."""
        return {"loss": float(learner.sum(_added(parts)))}


class NonFiniteError(RunError):
    """A loss or gradient that is not a number any more; the weights have not been updated with it."""


class Learner:
    """A model, how ranks share it, its precision, its optimiser and schedule. `balance` and `z` are the weights of the
    two router losses. `before_reduction` is called in each update when this rank's gradients are there and before the
    ranks meet for the last time; see `JitCheckpoint`."""

    def __init__(
        self,
        model: MaiThinkingForCausalLM,
        config: TrainingConfig,
        accelerator: Accelerator,
        *,
        balance: float,
        z: float = 0.0,
    ) -> None:
        self.config, self.accelerator, self.balance, self.z = config, accelerator, balance, z
        self.ranks, self.device = accelerator.num_processes, accelerator.device
        apply_compile_and_checkpointing(model, config.execution)
        self.divided = divides(config.execution, self.ranks)
        self._plain = model
        self.model, self._no_sync = parallelize(model, accelerator, config.execution)
        """What to call in training."""
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.before_reduction: Callable[[], None] = lambda: None

    def unwrap(self) -> MaiThinkingForCausalLM:
        """The model without any wrapper, for evaluation, sampling and saving; where `divided`, all ranks call it
        together."""
        return self._plain

    def together(self, batches: Iterable[T], idle: T) -> Iterator[T]:
        """`batches`, for passes through the model; where ranks must make as many as the others, `idle` ones behind
        them. Collective."""
        if not self.divided:
            yield from batches
            return
        remaining = iter(batches)
        while True:
            batch = next(remaining, None)
            more = torch.tensor(batch is not None, dtype=torch.int32, device=self.device)
            dist.all_reduce(more, dist.ReduceOp.MAX)
            if not more:
                return
            yield idle if batch is None else batch

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"model": ModelState(self.model), "optimizer": OptimizerState(self.model, self.optimizer)}

    def learning_rate(self, step: int) -> float:
        """Of update `step`, from 1: linear to the top over the warm-up, then `schedule.shape` to the end."""
        top, section = self.config.optimizer.learning_rate, self.config.schedule
        if step <= section.warmup_steps:
            return top * step / section.warmup_steps
        if section.shape == "constant":
            return top
        done = (step - section.warmup_steps) / max(1, self.config.steps - section.warmup_steps)
        return top * (section.floor + (1 - section.floor) * 0.5 * (1 + math.cos(math.pi * done)))

    def update(self, micro_batches: Sequence[Any], loss: Loss, step: int) -> dict[str, Any]:
        """Update the weights, for the `step`-th time, with this rank's micro-batches of a global batch. →
        `loss.metrics`, `balance_loss` (mean over the MoE layers; 1 when all experts are used alike), `router_z_loss`,
        `grad_norm` (L2, before clipping), `lr` and `routing_metrics`. Raises `NonFiniteError`, before any weight
        changes, when a loss or gradient is not finite. Collective."""
        counts = loss.count(micro_batches, self)
        with self._cached_bf16():
            parts, router_losses, counts_ME, entropy_M = self._accumulate(micro_batches, loss, counts)
        self.before_reduction()
        grad_norm = clip_gradients(self.model, self.config.optimizer.clip_norm)
        metrics = loss.metrics(parts, self)
        balance, z = self.sum(router_losses).tolist()
        entropy_M = self.sum(entropy_M) / counts.tokens
        for name, value in (("loss", metrics["loss"]), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                weights = f"weights are as after step {step - 1}"
                raise NonFiniteError(f"step {step}: the {name} is {value}; {weights}. {loss.advice}")
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if counts.signal:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        layers = max(1, counts_ME.size(0))
        routers = {"balance_loss": balance / layers, "router_z_loss": z / layers}
        return {**metrics, **routers, "grad_norm": grad_norm, "lr": rate, **routing_metrics(counts_ME, entropy_M)}

    def sum(self, value: Tensor) -> Tensor:
        """Over all ranks, in a fixed order."""
        if self.ranks > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value

    def moved(self, tensor: Tensor) -> Tensor:
        """To the device, which goes on with the last micro-batch meanwhile."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _cached_bf16(self) -> AbstractContextManager[None]:
        """Around a step's micro-batches, in which no weight changes: those that kernels on a GPU have rounded are
        rounded once for all."""
        ours = self._plain.config._experts_implementation == "bucketed_mm"
        # Replicas reduce the weights' own gradients; with checkpointing, a backward pass may be all micro-batches'.
        alone = self.ranks == 1 and not self.config.execution.activation_checkpointing
        if ours and alone and self.device.type == "cuda" and self.accelerator.mixed_precision == "bf16":
            return rounded_once(self._plain, torch.bfloat16)
        return nullcontext()

    def _accumulate(
        self, micro_batches: Sequence[Any], loss: Loss, counts: Counts
    ) -> tuple[list[Any], Tensor, Tensor, Tensor]:
        """Forward and backward of every micro-batch; gradients are averaged over ranks. → this rank's parts, the two
        router losses' sums [2], the experts' counts over all ranks [M, E], this rank's entropies [M]."""
        counts_ME = torch.zeros((), device=self.device) if counts.experts_ME is None else counts.experts_ME
        at_once = counts.experts_ME is None and self.config.execution.activation_checkpointing
        parts: list[Any] = []
        entropies: list[Tensor] = []
        router_losses: list[Tensor] = []
        waiting: list[tuple[tuple[Tensor, Routing], float]] = []  # with graphs and weights, until counts are known
        passes = self._agree_on_passes(len(micro_batches))
        for index in range(passes):
            idle, last = index >= len(micro_batches), index == passes - 1  # idle, it keeps the other ranks company
            # Whether DDP reduces is decided in the forward pass.
            with nullcontext() if last else self._no_sync():
                share, routing, part = loss.forward(micro_batches[min(index, len(micro_batches) - 1)], self)
                if counts.experts_ME is None:
                    counts_ME = counts_ME + self.sum(routing.counts_E * (not idle))
                waiting.append(((share, routing), 0.0 if idle else float(self.ranks)))
                if last or not at_once:
                    done = [self._add_router_losses(*one, counts_ME, counts.tokens) for one, _ in waiting]
                    weights = [weight for _, weight in waiting]
                    torch.stack([total * w for (total, _), w in zip(done, weights, strict=True)]).sum().backward()
                    router_losses += [of_routers for _, of_routers in done]
                    waiting.clear()
            if not idle:
                parts.append(part)
                entropies.append(routing.entropy.detach())
            del share, routing  # their graph makes room for the next one
        return parts, _added(router_losses[: len(parts)]), counts_ME, _added(entropies)

    def _add_router_losses(
        self, share: Tensor, routing: Routing, counts_ME: Tensor, tokens: float
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the whole objective, and of the two router losses, detached."""
        balance, z = balance_loss(counts_ME, routing.probabilities_E, tokens), routing.z.sum() / tokens
        total = share + self.balance * balance
        return total + self.z * z if self.z else total, torch.stack([balance.detach(), z.detach()])

    def _agree_on_passes(self, mine: int) -> int:
        """Packing gives ranks different numbers of micro-batches. Shards are gathered and rows exchanged in every
        forward pass, so all ranks must do as many; replicas meet only in the last backward pass."""
        if not self.divided:
            return mine
        most = torch.tensor(mine, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


def _added(values: Sequence[Tensor]) -> Tensor:
    return sum(values[1:], values[0])


def routing_metrics(counts_ME: Tensor, entropy_M: Tensor) -> dict[str, Any]:
    """Violation rate (max load / mean load − 1) layer by layer, its maximum, experts that no token chose, and the
    router's entropy in nats, mean over layers; from global counts [M, E]."""
    violation_M = counts_ME.max(dim=-1).values / counts_ME.mean(dim=-1) - 1
    return {
        "violation": violation_M.tolist(),
        "violation_max": float(violation_M.max()),
        "dead_experts": int((counts_ME == 0).sum()),
        "router_entropy": float(entropy_M.mean()),
    }


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, weight decay by kind (MAI-Thinking-1 report §2.6). Three groups: attention
    (everything inside an attention sublayer), embeddings (with the tied head), and the rest. The report exempts nothing
    else, so norm gains decay like what they belong to. Where ranks divide the experts, these are a group of their own:
    one operation takes no shards of different meshes. With Muon the matrices of each group are one of their own; the
    router is none of them, since its rows are experts."""
    decay = {
        "attention": section.weight_decay_attention,
        "embeddings": section.weight_decay_embeddings,
        "rest": section.weight_decay,
    }
    members: dict[tuple[str, DeviceMesh | None, bool], list[nn.Parameter]] = {
        (group, None, False): [] for group in decay
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = _group(name)
            matrix = parameter.dim() == 2 and group != "embeddings" and "router" not in name.split(".")
            muon = section.name == "muon" and matrix
            if muon and mesh_of(parameter) is not None:
                raise UsageError("optimizer.name: muon needs whole matrices on each rank; set execution.parallel=ddp")
            members.setdefault((group, mesh_of(parameter), muon), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay[group], "name": group, "muon": muon}
        for (group, _, muon), parameters in members.items()
        if parameters
    ]
    kind = MuonAdamW if section.name == "muon" else torch.optim.AdamW
    return kind(groups, lr=section.learning_rate, betas=section.betas, eps=section.epsilon, fused=True)


def _group(name: str) -> str:
    parts = name.split(".")
    if "attention" in parts:
        return "attention"
    return "embeddings" if "embed_tokens" in parts or "lm_head" in parts else "rest"
