"""Log-probabilities of responses under the learner's policy, with gradient.

The learner replays what the engine decided (MAI-Thinking-1 report §3.1): logits outside the recorded nucleus are −∞
before the softmax, and tokens go through the recorded experts, weighed by the learner's own router.

Shapes: B rows, T places in a row, N response tokens, V vocabulary, D hidden size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from mai_thinking.model.latent_moe import Routing
from mai_thinking.model.loss import CHUNK_ELEMENTS
from mai_thinking.rl.nucleus import unpack_bits
from mai_thinking.rl.packing import MicroBatch


class ResponseLogprobs(NamedTuple):
    """What a forward pass says of a micro-batch."""

    logprobs_N: torch.Tensor
    """fp32, with gradient, in the order of `MicroBatch.targets`."""
    routing: Routing
    """Sums over the real tokens, prompts included, for the balance loss; each part with a leading M."""


def response_logprobs(
    model: nn.Module,
    batch: MicroBatch,
    *,
    temperature: float,
    replay_nucleus: bool = True,
    replay_experts: bool = True,
) -> ResponseLogprobs:
    """The policy's log-probability of every response token, at the temperature that it was drawn with.

    `model` is a MaiThinkingForCausalLM or a wrapper of one (DDP, FSDP); the batch is on its device. Only response
    places go through the head.
    """

    def head(hidden_BTD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        hidden_ND = hidden_BTD[batch.response_mask].to(weight_VD.dtype)
        nucleus = batch.nucleus if replay_nucleus else None
        return token_logprobs(hidden_ND, weight_VD, batch.targets, nucleus, temperature)

    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        token_mask=batch.token_mask,
        expert_choices=batch.expert_choices if replay_experts else None,
        head=head,
        use_cache=False,
        output_router_logits=False,
    )
    return ResponseLogprobs(output.scores, output.routing)


def token_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    nucleus_NB: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """log softmax(hidden · weightᵀ / temperature)[target], over the nucleus (bit-packed) if given; [N] fp32.

    Never holds all logits: tokens go through in chunks, whose logits the backward pass computes again. Differentiable
    once. A target outside its nucleus has −∞.
    """
    return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, nucleus_NB, temperature)


class _TokenLogprobs(torch.autograd.Function):
    """d logprob / d logits = (one-hot − softmax) / temperature."""

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
        log_z_N = hidden_ND.new_empty(hidden_ND.size(0), dtype=torch.float32)
        logprobs_N = torch.empty_like(log_z_N)
        for chunk in _chunks(hidden_ND, weight_VD):
            logits = _logits(hidden_ND[chunk], weight_VD, nucleus_NB, chunk, temperature)
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
        for chunk in _chunks(hidden_ND, weight_VD):
            hidden = hidden_ND[chunk]
            logits = _logits(hidden, weight_VD, nucleus_NB, chunk, ctx.temperature)
            d_logits = logits.sub_(log_z_N[chunk, None]).exp_().mul_(-scale_N1[chunk])
            d_logits.scatter_add_(1, targets_N[chunk, None], scale_N1[chunk])
            d_logits = d_logits.to(weight_VD.dtype)
            torch.mm(d_logits, weight_VD, out=d_hidden[chunk])
            d_weight += d_logits.mT @ hidden
        return d_hidden, d_weight.to(weight_VD.dtype), None, None, None


def _chunks(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS.get(hidden_ND.device.type, 2**24) // weight_VD.size(0))
    return [slice(begin, begin + size) for begin in range(0, hidden_ND.size(0), size)]


def _logits(
    hidden: torch.Tensor, weight_VD: torch.Tensor, nucleus_NB: torch.Tensor | None, chunk: slice, temperature: float
) -> torch.Tensor:
    logits = F.linear(hidden, weight_VD).float().div_(temperature)
    if nucleus_NB is not None:
        logits.masked_fill_(~unpack_bits(nucleus_NB[chunk], weight_VD.size(0)), float("-inf"))
    return logits
