"""The policy-gradient objective of RL (MAI-Thinking-1 report §3), its entropy control, and their rivals.

Per token, with r = π_θ/π_old = exp(logprob − old_logprob) and the group's advantage A:

    loss = −min( clip(r, r_min, r_max)·A,  clip(r, 1 − ε, 1/(1 − ε) + k)·A )

summed over the response tokens and divided by their number in the *global* batch, over all ranks and micro-batches.
The second clip is PPO's trust region, whose upper end the controller moves; it leaves alone what moves back towards the
old policy (A < 0 and r large, A > 0 and r small), and there the first, outer clip takes hold. No KL, no critic.

Shapes: B responses (or rows of several, packed), T tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mai_thinking.errors import RunError

MAXIMA = ("ratio_max", "mismatch")
"""Statistics that are combined by their maximum; all others are by their sum."""
_LOG_RATIO_LIMIT = 80.0
"""exp(80) ≈ 5.5e34 is finite in float32, and so is its product with an advantage; no real ratio comes near it."""


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float,
    clip_relaxation: float,
    ratio_min: float,
    ratio_max: float,
    token_count: float | Tensor,
    dual_clip: float | None = None,
    entropy_bonus: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the loss (scalar, with gradient) and its statistics, detached float64 scalars for
    `objective_metrics`.

    `logprobs` [B, T] of the sampled tokens under the learner, with gradient; `old_logprobs` [B, T] under the engine
    that sampled them; `advantages` [B], or [B, T] where a row holds several responses; `mask` [B, T], nonzero at
    response tokens; `token_count`, the mask's sum over the whole global batch. Shares add up to the loss, and their
    gradients to its gradient; DDP averages over ranks, so a trainer multiplies by their number.

    `ratio_max=math.inf` with `ratio_min=0` is no outer clip. `dual_clip` is c of Ye et al. (2020): at A < 0 the loss is
    at most c·|A|. `entropy_bonus` is the weight of Ĥ = mean(−logprob·r), whose gradient is the entropy's.

    What stands where the mask is zero reaches neither loss nor gradient, NaN included. A logprob of −∞ (a token that
    the learner cannot sample) has r = 0 and no gradient. A NaN under the mask makes the loss NaN, for the trainer's
    guard to see. bf16 and fp16 are computed in float32.
    """
    logprobs, old_logprobs, advantages, mask = _masked(logprobs, old_logprobs, advantages, mask)
    log_ratio = logprobs - old_logprobs
    # Limited before exp: past the overflow, the clip's zero gradient times exp's infinite one would be NaN.
    ratio = log_ratio.clamp(max=_LOG_RATIO_LIMIT).exp()
    lower, upper = 1 - epsilon, 1 / (1 - epsilon) + clip_relaxation
    outer = ratio.clamp(ratio_min, ratio_max)
    objective = torch.minimum(outer * advantages, ratio.clamp(lower, upper) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    # p·log p is 0 at p = 0, where the product of its factors is not a number.
    entropy = -torch.where(logprobs == -math.inf, 0.0, logprobs) * outer
    loss = -torch.where(mask, objective + entropy_bonus * entropy, 0.0).sum() / token_count

    gain, cost = advantages > 0, advantages < 0
    beyond = (ratio < ratio_min) | (ratio > ratio_max)
    if dual_clip is not None:
        beyond = beyond | (cost & (ratio > dual_clip))
    sums = {
        "tokens": mask,
        "entropy": entropy,
        "ratio": ratio,
        "clipped": (gain & (ratio > upper)) | (cost & (ratio < lower)),
        "outer_clipped": beyond,
    }
    statistics = {name: torch.where(mask, value.detach().double(), 0.0).sum() for name, value in sums.items()}
    for name, value in zip(MAXIMA, (ratio, log_ratio.abs()), strict=True):
        counted = torch.where(mask, value.detach().double(), 0.0)
        statistics[name] = counted.max() if counted.numel() else counted.new_zeros(())
    return loss, statistics | {"loss": loss.detach().double()}


def _masked(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All four as [B, T], zero where nothing counts; float32 or wider, and a boolean mask."""
    if logprobs.shape != old_logprobs.shape or logprobs.shape != mask.shape:
        raise ValueError(
            f"logprobs {tuple(logprobs.shape)}, old_logprobs {tuple(old_logprobs.shape)} and mask {tuple(mask.shape)} "
            "must have one shape [B, T]"
        )
    if advantages.shape not in (logprobs.shape, logprobs.shape[:1]):
        raise ValueError(f"advantages {tuple(advantages.shape)} must be [B] or [B, T] for {tuple(logprobs.shape)}")
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand_as(logprobs)
    mask = mask != 0
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    # `where`, not a product: 0·NaN is NaN, forward and backward.
    new, old, gains = (torch.where(mask, x.to(dtype), 0.0) for x in (logprobs, old_logprobs.detach(), advantages))
    return new, old, gains, mask


def objective_metrics(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The statistics of a step's micro-batches, on all ranks, as a metrics record's fields; all but the loss are 0
    where there are no tokens. Collective where torch.distributed runs.

    `entropy` is Ĥ = mean(−logprob·r) in nats per token; `clip_fraction` the share of tokens whose gradient the trust
    region took; `outer_clip_fraction` of those with r outside the outer clip, or past the dual clip; `mismatch` max
    |logprob − old_logprob|: learner against engine, as long as both have the same weights.
    """
    value: dict[str, float] = {}
    for operation, of_maxima in ((dist.ReduceOp.SUM, False), (dist.ReduceOp.MAX, True)):
        names = sorted(name for name in parts[0] if (name in MAXIMA) == of_maxima)
        columns = [torch.stack([part[name] for part in parts]) for name in names]
        values = torch.stack([column.amax() if of_maxima else column.sum() for column in columns])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values, operation)
        value |= dict(zip(names, values.tolist(), strict=True))
    tokens = max(1.0, value["tokens"])
    return {
        "loss": value["loss"],
        "entropy": value["entropy"] / tokens,
        "clip_fraction": value["clipped"] / tokens,
        "outer_clip_fraction": value["outer_clipped"] / tokens,
        "ratio_mean": value["ratio"] / tokens,
        "ratio_max": value["ratio_max"],
        "mismatch": value["mismatch"],
    }


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """(R − mean)/std over one group of rollouts, shared by all tokens of each (§3). Zeros for a group without variance.

    The standard deviation is the group's own (divided by G, not G − 1) and nothing is added to it, so that the mean
    square of the advantages is 1 whatever the rewards' scale. Differences within rounding (1e-9 of the rewards' size)
    are no variance. ValueError for a reward that is not finite.
    """
    values = [float(reward) for reward in rewards]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"a reward is not finite: {values}")
    if not values or max(values) - min(values) <= 1e-9 * max(map(abs, values)):
        return [0.0] * len(values)
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / deviation for value in values]


class EntropyController:
    """The integral controller of the trust region's upper end (§3): after each step

    k ← clip(k + δ·sign(H* − Ĥ), 0, k_max)

    Too little entropy raises k, which lets unlikely tokens with A > 0 grow further in one step; too much lowers it.
    A `step_size` of 0 is its rival, a fixed k.
    """

    def __init__(self, target_entropy: float, step_size: float, max_relaxation: float, *, initial: float = 0.0) -> None:
        """H* in nats per token, δ, k_max, and k₀ in [0, k_max]."""
        self.target_entropy, self.step_size, self.max_relaxation = target_entropy, step_size, max_relaxation
        self.clip_relaxation = initial

    def update(self, entropy: float) -> float:
        """k after a step whose Ĥ (over the global batch) was `entropy`. RunError if that is not a number."""
        if math.isnan(entropy):
            raise RunError("the entropy of the batch is not a number; lower the learning rate or go back a checkpoint")
        direction = (entropy < self.target_entropy) - (entropy > self.target_entropy)
        relaxed = self.clip_relaxation + self.step_size * direction
        self.clip_relaxation = min(max(relaxed, 0.0), self.max_relaxation)
        return self.clip_relaxation

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: k."""
        return {"clip_relaxation": self.clip_relaxation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.clip_relaxation = float(state["clip_relaxation"])
