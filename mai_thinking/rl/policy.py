"""The policy's loss of a gradient step, and the log-probabilities of responses that it is made of.

The learner replays what the engine decided (MAI-Thinking-1 report §3.1): logits outside the recorded nucleus are −∞
before the softmax, and tokens go through the recorded experts, weighed by the learner's own router.

As in pre-training, sums are divided by counts over the *global* batch, so that how it is cut into ranks and
micro-batches does not change what is learned. The experts of every token are known before the forward pass, from the
engine: the balance loss is exact over all ranks and micro-batches without waiting for any.

Shapes: B rows, T places in a row, N response tokens, V vocabulary, D hidden size; S tokens in all nuclei together.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mai_thinking.config.grpo import ObjectiveSection, RolloutSection
from mai_thinking.model.latent_moe import Routing
from mai_thinking.model.loss import CHUNK_ELEMENTS
from mai_thinking.model.projection import fp32_product
from mai_thinking.rl.engine.nucleus import unpack_bits
from mai_thinking.rl.nuclei import set_bits
from mai_thinking.rl.objective import grpo_loss, objective_metrics
from mai_thinking.training.learner import Counts, Learner, MicroBatch

NARROW = 1 / 128
"""Nuclei of up to this share of the vocabulary are computed token by token on a CPU: for 8 tokens of 4,096 in a
fifteenth of the time that whole rows of logits take, for 32 in half, for 64 in as long."""


class PolicyLoss:
    """`grpo_loss` on packed rollouts whose advantages are `advantages` ([rollouts] fp32), with the trust region relaxed
    by k = `clip_relaxation`. Serves one update."""

    advice = "Lower the learning rate, or switch the outer clip and both replays on"

    def __init__(
        self,
        section: ObjectiveSection,
        rollouts: RolloutSection,
        advantages: Sequence[float],
        *,
        clip_relaxation: float,
        num_experts: int,
    ) -> None:
        self._settings = {**section.loss_settings, "clip_relaxation": clip_relaxation}
        self._rollouts, self._num_experts = rollouts, num_experts
        self._advantages = torch.tensor(advantages, dtype=torch.float32)
        self.signal = True  # Whether any advantage of the global batch is not zero, once it has been counted

    def count(self, micro_batches: Sequence[MicroBatch], learner: Learner) -> Counts:
        """Response tokens, how often each expert was chosen, and whether any advantage says anything."""
        layers = micro_batches[0]["expert_choices"].size(0)
        counts_ME = torch.zeros(layers, self._num_experts)
        for batch in micro_batches:
            chosen = batch["expert_choices"][:, batch["token_mask"]].flatten(1)
            counts_ME += torch.stack([torch.bincount(row, minlength=self._num_experts) for row in chosen])
        tokens = sum(batch["targets"].numel() for batch in micro_batches)
        sums = torch.tensor([tokens, self._advantages.count_nonzero()], dtype=torch.float32)
        self._response_tokens, unequal = learner.sum(sums.to(learner.device))
        counts_ME = learner.sum(counts_ME.to(learner.device))
        real = float(counts_ME[0].sum()) / micro_batches[0]["expert_choices"].size(-1)
        self.signal = bool(unequal)
        return Counts(real, counts_ME, self.signal)

    def forward(
        self, micro_batch: MicroBatch, learner: Learner
    ) -> tuple[torch.Tensor, Routing, dict[str, torch.Tensor]]:
        """The responses' log-probs under the learner's weights, and the objective on them."""
        batch = {name: learner.moved(tensor) for name, tensor in micro_batch.items()}
        with learner.accelerator.autocast():
            logprobs_N, routing = response_logprobs(
                learner.model,
                batch,
                temperature=self._rollouts.temperature,
                replay_nucleus=self._rollouts.replay_nucleus,
                replay_experts=self._rollouts.replay_experts,
            )
        advantages_N = self._advantages.to(learner.device)[batch["rollout_index"]]
        mask_N = torch.ones_like(logprobs_N, dtype=torch.bool)
        new, old, gains, mask = (part[None] for part in (logprobs_N, batch["old_logprobs"], advantages_N, mask_N))
        loss, statistics = grpo_loss(new, old, gains, mask, token_count=self._response_tokens, **self._settings)
        return loss, routing, statistics

    def metrics(self, parts: list[dict[str, torch.Tensor]], learner: Learner) -> dict[str, float]:
        """`objective_metrics` over the global batch."""
        return objective_metrics(parts)


def response_logprobs(
    model: nn.Module,
    batch: MicroBatch,
    *,
    temperature: float,
    replay_nucleus: bool = True,
    replay_experts: bool = True,
) -> tuple[torch.Tensor, Routing]:
    """The policy's log-probability of every response token, at the temperature that it was drawn with: [N] fp32, with
    gradient, in the order of `targets`. And the routing's sums over the real tokens, prompts included.

    `model` is a MaiThinkingForCausalLM or a wrapper of one (DDP, FSDP); the batch is on its device. Only response
    places go through the head.
    """

    def head(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        hidden_ND = hidden_BTD[batch["response_mask"]].to(dtype or weight_VD.dtype)
        nucleus = batch["nucleus"] if replay_nucleus else None
        return token_logprobs(hidden_ND, weight_VD, batch["targets"], nucleus, temperature)

    output = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        token_mask=batch["token_mask"],
        expert_choices=batch["expert_choices"] if replay_experts else None,
        head=head,
        use_cache=False,
        output_router_logits=False,
        output_routing=True,
    )
    return output.scores, output.routing


def token_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    nucleus_NB: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """log softmax(hidden · weightᵀ / temperature)[target], over the nucleus (bit-packed) if given; [N] fp32. The
    product is in the hidden states' dtype.

    Never holds all logits, and computes only those inside where the nucleus is narrow. A target outside its nucleus
    has −∞, or a meaningless value where that is narrow. Differentiable once.
    """
    if nucleus_NB is None or nucleus_NB.device.type != "cpu":
        return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, nucleus_NB, temperature)
    size_N = torch.from_numpy(np.bitwise_count(nucleus_NB.numpy()).sum(axis=-1, dtype=np.int64))
    is_narrow_N = size_N <= NARROW * weight_VD.size(0)
    narrow, wide = (which.nonzero().squeeze(1) for which in (is_narrow_N, ~is_narrow_N))
    parts = [
        function(hidden_ND[rows], weight_VD, targets_N[rows], nucleus_NB[rows], temperature)
        for function, rows in ((_narrow_logprobs, narrow), (_TokenLogprobs.apply, wide))
    ]
    return torch.cat(parts).index_select(0, torch.cat((narrow, wide)).argsort())


def _narrow_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    nucleus_NB: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """`token_logprobs` from the products of each hidden state with its own nucleus's tokens."""
    row_S, token_S = (torch.from_numpy(part) for part in set_bits(nucleus_NB.numpy()))
    logits_S = (hidden_ND.index_select(0, row_S) * weight_VD.index_select(0, token_S)).sum(dim=-1).float() / temperature
    with torch.no_grad():
        lowest_N = logits_S.new_full((hidden_ND.size(0),), float("-inf"))
        largest_N = lowest_N.scatter_reduce(0, row_S, logits_S, "amax")
    z_N = torch.zeros_like(largest_N).index_add(0, row_S, (logits_S - largest_N[row_S]).exp())
    target_N = (hidden_ND * weight_VD.index_select(0, targets_N)).sum(dim=-1).float() / temperature
    return target_N - largest_N - z_N.log()


class _TokenLogprobs(torch.autograd.Function):
    """By whole rows of logits, in chunks that the backward pass computes again. d logprob / d logits = (one-hot −
    softmax) / temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        nucleus_NB: torch.Tensor | None,
        temperature: float,
    ) -> torch.Tensor:
        ctx.temperature = temperature
        operand_VD = weight_VD.to(hidden_ND.dtype)
        log_z_N = hidden_ND.new_empty(hidden_ND.size(0), dtype=torch.float32)
        logprobs_N = torch.empty_like(log_z_N)
        for chunk in _chunks(hidden_ND, weight_VD):
            logits = _logits(hidden_ND[chunk], operand_VD, nucleus_NB, chunk, temperature)
            log_z_N[chunk] = logits.logsumexp(dim=-1)
            logprobs_N[chunk] = logits.gather(1, targets_N[chunk, None]).squeeze(1) - log_z_N[chunk]
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, nucleus_NB, log_z_N)
        return logprobs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N, nucleus_NB, log_z_N = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden_ND)
        d_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        scale_N1 = (d_logprobs_N / ctx.temperature)[:, None]
        operand_VD = weight_VD.to(hidden_ND.dtype)
        for chunk in _chunks(hidden_ND, weight_VD):
            hidden = hidden_ND[chunk]
            logits = _logits(hidden, operand_VD, nucleus_NB, chunk, ctx.temperature)
            d_logits = logits.sub_(log_z_N[chunk, None]).exp_().mul_(-scale_N1[chunk])
            d_logits.scatter_add_(1, targets_N[chunk, None], scale_N1[chunk])
            d_logits = d_logits.to(operand_VD.dtype)
            torch.mm(d_logits, operand_VD, out=d_hidden[chunk])
            d_weight += fp32_product(d_logits.mT, hidden)
        return d_hidden, d_weight.to(weight_VD.dtype), None, None, None


def _chunks(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS.get(hidden_ND.device.type, 2**24) // weight_VD.size(0))
    return [slice(begin, begin + size) for begin in range(0, hidden_ND.size(0), size)]


def _logits(
    hidden: torch.Tensor, weight_VD: torch.Tensor, nucleus_NB: torch.Tensor | None, chunk: slice, temperature: float
) -> torch.Tensor:
    logits = fp32_product(hidden, weight_VD.mT).div_(temperature)
    if nucleus_NB is not None:
        logits.masked_fill_(~unpack_bits(nucleus_NB[chunk], weight_VD.size(0)), float("-inf"))
    return logits
