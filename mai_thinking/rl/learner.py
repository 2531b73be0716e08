"""One gradient step of the climb: replay the rollouts, objective, clip, update.

As in pre-training, sums are divided by counts over the *global* batch, so that how it is cut into ranks and
micro-batches does not change what is learned (MAI-Thinking-1 report §3.1). The experts of every token are known before
the forward pass, from the engine: the balance loss is exact over all ranks and micro-batches without waiting for any.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.model.latent_moe import balance_loss
from mai_thinking.rl.buffer import Group
from mai_thinking.rl.objective import Objective, Statistics, merge_statistics, objective_metrics, reduce_statistics
from mai_thinking.rl.packing import MicroBatch, pack
from mai_thinking.rl.policy import response_logprobs
from mai_thinking.training.parallel import Parallel, clip_gradients
from mai_thinking.training.step import guard_finite, routing_metrics

_ADVICE = "Lower the learning rate, or switch the outer clip and both replays on"


class PolicyStep:
    """Callable that takes this rank's groups of a global batch through the model and the optimiser."""

    def __init__(
        self,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        config: GrpoConfig,
        experts: int,
    ) -> None:
        """`experts`: the model's number of them."""
        self.parallel, self.optimizer, self.objective, self.config = parallel, optimizer, objective, config
        self.experts = experts
        self.ranks, self.device = parallel.accelerator.num_processes, parallel.accelerator.device

    def __call__(self, groups: Sequence[Group], learning_rate: float, step: int) -> dict[str, float]:
        """Learn from `groups`; → metrics. Raises NonFiniteError, before any weight changes, when a loss or gradient is
        not finite."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        advantages = torch.tensor([a for group in groups for a in group.advantages], dtype=torch.float32)
        packing = self.config.packing
        batches = pack(rollouts, row_length=packing.row_length, rows=packing.rows, num_experts=self.experts)
        response_tokens, counts_ME = self._global_counts(batches)
        places = float(counts_ME[0].sum()) / batches[0].expert_choices.size(-1)
        statistics, entropies = [], []
        forwards = self._agree_on_forwards(len(batches))
        with self.parallel.cached_bf16():
            for index in range(forwards):
                batch, idle = batches[min(index, len(batches) - 1)].to(self.device), index >= len(batches)
                with nullcontext() if index == forwards - 1 else self.parallel.no_sync():
                    loss, parts, entropy = self._loss(batch, advantages, response_tokens, counts_ME, places)
                    # Gradients are averaged over ranks; the counts are global. An idle pass only keeps others company.
                    (loss * (0.0 if idle else self.ranks)).backward()
                if not idle:
                    statistics.append(parts)
                    entropies.append(entropy)
        grad_norm = clip_gradients(self.parallel.model, self.config.optimizer.clip_norm)
        metrics = objective_metrics(reduce_statistics(merge_statistics(statistics)))
        guard_finite(step, metrics["loss"], grad_norm, _ADVICE)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clip_relaxation = self.objective.clip_relaxation
        self.objective.after_step(metrics["entropy"])
        entropy_M = self._sum(torch.stack(entropies).sum(dim=0)) / places
        routing = routing_metrics(counts_ME, entropy_M)
        return {**metrics, "clip_relaxation": clip_relaxation, "grad_norm": grad_norm, **routing}

    def _loss(
        self,
        batch: MicroBatch,
        advantages: torch.Tensor,
        response_tokens: torch.Tensor,
        counts_ME: torch.Tensor,
        places: float,
    ) -> tuple[torch.Tensor, Statistics, torch.Tensor]:
        """This micro-batch's share of the loss, its statistics, and the routers' entropies summed over its tokens."""
        rollouts = self.config.rollouts
        with self.parallel.accelerator.autocast():
            logprobs_N, routing = response_logprobs(
                self.parallel.model,
                batch,
                temperature=rollouts.temperature,
                replay_nucleus=rollouts.replay_nucleus,
                replay_experts=rollouts.replay_experts,
            )
        advantages_N = advantages.to(self.device)[batch.rollout_index]
        mask_N = torch.ones_like(logprobs_N, dtype=torch.bool)
        new, old, gains, mask = (part[None] for part in (logprobs_N, batch.old_logprobs, advantages_N, mask_N))
        loss, statistics = self.objective.loss(new, old, gains, mask, response_tokens)
        balance = balance_loss(counts_ME, routing.probabilities_E, places)
        return loss + self.config.balance * balance, statistics, routing.entropy.detach()

    def _global_counts(self, batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Response tokens, and how often each expert was chosen [M, E], over all ranks and micro-batches."""
        layers = batches[0].expert_choices.size(0)
        counts_ME = torch.zeros(layers, self.experts)
        for batch in batches:
            chosen = batch.expert_choices[:, batch.token_mask].flatten(1)
            counts_ME += torch.stack([torch.bincount(row, minlength=self.experts) for row in chosen])
        tokens = torch.tensor(float(sum(batch.targets.numel() for batch in batches)))
        return self._sum(tokens.to(self.device)), self._sum(counts_ME.to(self.device))

    def _agree_on_forwards(self, mine: int) -> int:
        """Packing gives ranks different numbers of micro-batches. Shards are gathered in every forward pass, so all
        ranks must do as many; replicas meet only in the last backward pass."""
        if self.ranks == 1 or self.config.execution.parallel == "ddp":
            return mine
        most = torch.tensor(mine, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        if self.ranks > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value
