"""The policy's loss of one gradient step: replay the rollouts, compare with the engine's log-probs, weigh by advantage.

As in pre-training, sums are divided by counts over the *global* batch, so that how it is cut into ranks and
micro-batches does not change what is learned (MAI-Thinking-1 report §3.1). The experts of every token are known before
the forward pass, from the engine: the balance loss is exact over all ranks and micro-batches without waiting for any.
"""

from collections.abc import Sequence

import torch

from mai_thinking.config.grpo import RolloutSection
from mai_thinking.rl.objective import Objective, Statistics, merge_statistics, objective_metrics, reduce_statistics
from mai_thinking.rl.packing import MicroBatch
from mai_thinking.rl.policy import response_logprobs
from mai_thinking.training.learner import Counts, Forward, Learner


class PolicyLoss:
    """`objective` on packed rollouts whose advantages are `advantages` ([rollouts] fp32). Serves one update."""

    advice = "Lower the learning rate, or switch the outer clip and both replays on"

    def __init__(
        self, objective: Objective, rollouts: RolloutSection, advantages: Sequence[float], num_experts: int
    ) -> None:
        self._objective, self._rollouts, self._num_experts = objective, rollouts, num_experts
        self._advantages = torch.tensor(advantages, dtype=torch.float32)
        self.signal = True
        """Whether any advantage of the global batch is not zero, once it has been counted."""

    def count(self, micro_batches: Sequence[MicroBatch], learner: Learner) -> Counts:
        """Response tokens, how often each expert was chosen, and whether any advantage says anything."""
        layers = micro_batches[0].expert_choices.size(0)
        counts_ME = torch.zeros(layers, self._num_experts)
        for batch in micro_batches:
            chosen = batch.expert_choices[:, batch.token_mask].flatten(1)
            counts_ME += torch.stack([torch.bincount(row, minlength=self._num_experts) for row in chosen])
        tokens = sum(batch.targets.numel() for batch in micro_batches)
        sums = torch.tensor([tokens, self._advantages.count_nonzero()], dtype=torch.float32)
        self._response_tokens, unequal = learner.sum(sums.to(learner.device))
        counts_ME = learner.sum(counts_ME.to(learner.device))
        real = float(counts_ME[0].sum()) / micro_batches[0].expert_choices.size(-1)
        self.signal = bool(unequal)
        return Counts(real, counts_ME, self.signal)

    def forward(self, micro_batch: MicroBatch, learner: Learner) -> Forward:
        """The responses' log-probs under the learner's weights, and the objective on them."""
        batch = micro_batch.to(learner.device)
        with learner.accelerator.autocast():
            logprobs_N, routing = response_logprobs(
                learner.model,
                batch,
                temperature=self._rollouts.temperature,
                replay_nucleus=self._rollouts.replay_nucleus,
                replay_experts=self._rollouts.replay_experts,
            )
        advantages_N = self._advantages.to(learner.device)[batch.rollout_index]
        mask_N = torch.ones_like(logprobs_N, dtype=torch.bool)
        new, old, gains, mask = (part[None] for part in (logprobs_N, batch.old_logprobs, advantages_N, mask_N))
        loss, statistics = self._objective.loss(new, old, gains, mask, self._response_tokens)
        return Forward(loss, routing, statistics)

    def metrics(self, parts: list[Statistics], learner: Learner) -> dict[str, float]:
        """`objective_metrics` over the global batch."""
        return objective_metrics(reduce_statistics(merge_statistics(parts)))
