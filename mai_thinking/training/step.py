"""One step of training: forward and backward over the micro-batches of a global batch, clip, update.

Losses are normalised by counts over the *global* batch, so that how it is cut into ranks and micro-batches does not
change what is learned. The balance loss takes expert frequencies over the global batch too (MAI-Thinking-1 report
§2.1): exactly over ranks. Over micro-batches it has two modes:

- With activation checkpointing, exactly. All micro-batches go forward first, keeping little more than each layer's
  input, and one backward follows when all counts are known. This costs no arithmetic beyond the checkpointing's own.
- Without, by running counts: micro-batch i is balanced against the counts of micro-batches 1 … i. Waiting for the rest
  would mean to keep every graph, which is what accumulation is there to avoid.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.errors import RunError
from mai_thinking.model.configuration import MaiThinkingConfig
from mai_thinking.model.latent_moe import Routing, balance_loss
from mai_thinking.training.parallel import Parallel, clip_gradients

MicroBatch = dict[str, torch.Tensor]
_ADVICE = "Lower the learning rate, or start again from the newest checkpoint with another seed"


@dataclass(frozen=True)
class StepResult:
    """What a step did, over the global batch."""

    loss: float
    """Cross-entropy per predicted token, in nats."""
    balance_loss: float
    """Mean over the MoE layers; 1 when all experts are used alike."""
    router_z_loss: float
    grad_norm: float
    """L2 norm before clipping."""
    routing: dict[str, Any]
    """`violation` (a list, layer by layer), `violation_max`, `dead_experts`, `router_entropy`."""

    def metrics(self) -> dict[str, Any]:
        """All of it, as metrics.jsonl has it."""
        return {
            "loss": self.loss,
            "balance_loss": self.balance_loss,
            "router_z_loss": self.router_z_loss,
            "grad_norm": self.grad_norm,
            **self.routing,
        }


class NonFiniteError(RunError):
    """A loss or gradient that is not a number any more; the weights have not been updated with it."""


class TrainStep:
    """Callable that takes this rank's micro-batches of a global batch through the model and the optimiser.

    `balance` and `z` are the weights of the two router losses.
    """

    def __init__(
        self,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float,
        balance: float,
        z: float,
        exact_balance: bool,
    ) -> None:
        self.parallel, self.optimizer = parallel, optimizer
        self.clip_norm, self.balance, self.z, self.exact_balance = clip_norm, balance, z, exact_balance
        self.ranks, self.device = parallel.accelerator.num_processes, parallel.accelerator.device

    @classmethod
    def of_pretraining(
        cls,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        config: PretrainConfig,
        architecture: MaiThinkingConfig,
    ) -> Self:
        """With the weights of `config` and of the model's."""
        return cls(
            parallel,
            optimizer,
            clip_norm=config.optimizer.clip_norm,
            balance=architecture.router_aux_loss_coef,
            z=architecture.router_z_loss_coef,
            exact_balance=config.execution.activation_checkpointing,
        )

    def __call__(self, micro_batches: Sequence[MicroBatch], learning_rate: float, step: int) -> StepResult:
        """Learn from `micro_batches`: dicts of [B, T] int64 `input_ids`, `labels` (next tokens, -100 for none) and
        `position_ids`, and, where there is padding, [B, T] bool `token_mask` that is false there. Raises
        `NonFiniteError`, before any weight changes, when a loss or gradient is not finite."""
        labels = torch.tensor([float((batch["labels"] != -100).sum()) for batch in micro_batches]).sum()
        label_count = self._sum(labels.to(self.device))
        token_count = self._token_count(micro_batches)
        accumulate = self._accumulate_exact if self.exact_balance else self._accumulate_running
        with self.parallel.cached_bf16():
            losses, counts, entropy = accumulate(micro_batches, label_count, token_count)
        grad_norm = clip_gradients(self.parallel.model, self.clip_norm)
        cross_entropy, balance, z = self._sum(losses).tolist()
        guard_finite(step, cross_entropy, grad_norm, _ADVICE)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        layers = max(1, counts.size(0))
        return StepResult(
            loss=cross_entropy,
            balance_loss=balance / layers,
            router_z_loss=z / layers,
            grad_norm=grad_norm,
            routing=routing_metrics(counts, self._sum(entropy) / token_count),
        )

    def _accumulate_running(
        self, micro_batches: Sequence[MicroBatch], label_count: torch.Tensor, token_count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        losses = counts = entropy = torch.zeros((), device=self.device)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.parallel.no_sync():
                cross_entropy, routing = self._forward(batch, label_count)
                counts = counts + self._sum(routing.counts_E)
                total, parts = self._total(cross_entropy, routing, counts, token_count)
                (total * self.ranks).backward()  # gradients are averaged over ranks; the counts are global
            losses, entropy = losses + parts, entropy + routing.entropy
        return losses, counts, entropy

    def _accumulate_exact(
        self, micro_batches: Sequence[MicroBatch], label_count: torch.Tensor, token_count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        forwards = []
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            # Whether DDP reduces is decided in the forward pass; here one backward follows the last of them.
            with nullcontext() if last else self.parallel.no_sync():
                forwards.append(self._forward(batch, label_count))
        counts = self._sum(torch.stack([routing.counts_E for _, routing in forwards]).sum(dim=0))
        results = [self._total(cross_entropy, routing, counts, token_count) for cross_entropy, routing in forwards]
        (torch.stack([total for total, _ in results]).sum() * self.ranks).backward()
        losses = torch.stack([parts for _, parts in results]).sum(dim=0)
        return losses, counts, torch.stack([routing.entropy for _, routing in forwards]).sum(dim=0)

    def _forward(self, batch: MicroBatch, label_count: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        with self.parallel.accelerator.autocast():
            output = self.parallel.model(
                input_ids=self._moved(batch["input_ids"]),
                position_ids=self._moved(batch["position_ids"]),
                shift_labels=self._moved(batch["labels"]),
                token_mask=None if "token_mask" not in batch else self._moved(batch["token_mask"]),
                num_items_in_batch=label_count,
                skip_logits=True,
                use_cache=False,
                output_router_logits=False,
            )
        return output.loss, output.routing

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device, which goes on with the last micro-batch meanwhile."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _total(
        self, cross_entropy: torch.Tensor, routing: Routing, counts_ME: torch.Tensor, token_count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This micro-batch's share of the objective, and its three parts, detached."""
        balance = balance_loss(counts_ME, routing.probabilities_E, token_count)
        z = routing.z.sum() / token_count
        total = cross_entropy + self.balance * balance + self.z * z
        return total, torch.stack([cross_entropy.detach(), balance.detach(), z.detach()])

    def _token_count(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Tokens that the routers' sums run over, of all ranks."""
        if "token_mask" not in micro_batches[0]:
            return self.ranks * sum(batch["input_ids"].numel() for batch in micro_batches)
        mine = torch.stack([batch["token_mask"].sum() for batch in micro_batches]).sum()
        return int(self._sum(mine.to(self.device)))

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """Over all ranks, in a fixed order."""
        if self.ranks > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value


def guard_finite(step: int, loss: float, grad_norm: float, advice: str) -> None:
    """`NonFiniteError`, with `advice`, if either is not a number; to be called before the weights change."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise NonFiniteError(f"step {step}: the {name} is {value}; weights are as after step {step - 1}. {advice}")


def routing_metrics(counts_ME: torch.Tensor, entropy_M: torch.Tensor) -> dict[str, Any]:
    """Violation rate (max load / mean load − 1) layer by layer, its maximum, experts that no token chose, and the
    router's entropy in nats, mean over layers; from global counts [M, E]."""
    violation_M = counts_ME.max(dim=-1).values / counts_ME.mean(dim=-1) - 1
    return {
        "violation": violation_M.tolist(),
        "violation_max": float(violation_M.max()),
        "dead_experts": int((counts_ME == 0).sum()),
        "router_entropy": float(entropy_M.mean()),
    }
