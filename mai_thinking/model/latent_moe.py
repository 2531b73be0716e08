"""LatentMoE: 512 experts that work in a shared, narrower space.

    x ──router──────────────► 8 experts and their weights
    x ──down (D → latent)──► experts (SwiGLU in the latent space) ──► combine ──up (latent → D)──► out

Source: MAI-Thinking-1 report §2.1 and §2.6.3. The router reads the full width; the projections down and up are
shared by all experts; nothing is normed in between; there is no shared expert; no token is ever dropped.

Shapes: T tokens (batch and sequence flattened), D hidden size, L latent size, F expert inner size, E experts, K chosen
per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations import use_experts_implementation

from mai_thinking.model.configuration import MaiThinkingConfig
from mai_thinking.model.expert_parallel import ExpertExchange
from mai_thinking.model.experts import eager_experts
from mai_thinking.model.projection import residual_projection, weight_dtype
from mai_thinking.model.router_product import router_product


class Routing(NamedTuple):
    """What the balance loss and the metrics need of a layer's routing; all fp32, padding tokens left out.

    Everything is a sum over tokens, so that micro-batches and ranks can be added up. A model's output holds the same
    with a leading dimension of MoE layers.
    """

    counts_E: Tensor
    """Times that each expert was chosen. No gradient."""
    probabilities_E: Tensor
    """Σ over tokens of the router's probabilities, with gradient."""
    z: Tensor
    """Σ over tokens of logsumexp(logits)², with gradient; a scalar."""
    entropy: Tensor
    """Σ over tokens of the entropy of the router's distribution, in nats. No gradient; a scalar."""
    tokens: Tensor
    """The number of tokens that the sums run over; a scalar."""


class Router(nn.Module):
    """Softmax gate over all experts and a stable top-k; weights, product and logits in fp32."""

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.renormalize = config.renormalize_top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TD: Tensor, chosen_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """→ gate weights [T, K], chosen experts [T, K] int64, logits [T, E], probabilities [T, E].

        Given `chosen_TK`, it weighs these experts instead of choosing (routing replay, §3.1).
        """
        in_half_precision = x_TD.is_cuda and torch.is_autocast_enabled("cuda")
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = router_product(x_TD.float(), self.weight.float(), by_parts=in_half_precision)
        probabilities_TE = logits_TE.softmax(dim=-1)
        if chosen_TK is None:
            chosen_TK = stable_top_k(probabilities_TE.detach(), self.top_k)
        gates_TK = probabilities_TE.gather(1, chosen_TK)
        if self.renormalize:
            gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        return gates_TK, chosen_TK, logits_TE, probabilities_TE


def stable_top_k(probabilities_TE: Tensor, k: int) -> Tensor:
    """Indices of each row's k largest non-negative fp32 values, the lower index first among equals; [T, k] int64.

    `torch.topk` promises no order among equals, and a full stable sort is slow. The bits of non-negative floats order
    like integers, so a key of (value's bits, reversed index) has no equals.
    """
    experts = probabilities_TE.size(-1)
    bits = probabilities_TE.contiguous().view(torch.int32).long()
    keys = bits * experts + torch.arange(experts - 1, -1, -1, device=bits.device)
    if torch.compiler.is_compiling() and keys.is_cuda:
        return _largest_by_turns(keys, experts, k)
    return keys.topk(k, dim=-1).indices


def _largest_by_turns(keys_TE: Tensor, experts: int, k: int) -> Tensor:
    """`stable_top_k` from its keys by k maxima, which a compiler makes one kernel of: each row is read once."""
    chosen = []
    for _ in range(k):
        largest_T1 = keys_TE.amax(dim=-1, keepdim=True)
        chosen.append(experts - 1 - largest_T1 % experts)
        keys_TE = torch.where(keys_TE == largest_T1, -1, keys_TE)
    return torch.cat(chosen, dim=-1)


@use_experts_implementation
class Experts(nn.Module):
    """E SwiGLU networks L → F → L as two stacked tensors, in the layout of the transformers experts interface.

    `config._experts_implementation` picks the computation: "bucketed_mm" (ours), or the library's "grouped_mm",
    "batched_mm", ... ; "eager" is the definition.
    """

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        E, L, inner = config.num_experts, config.latent_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, L))
        self.down_proj = nn.Parameter(torch.empty(E, L, inner))
        self.act_fn = F.silu
        self.copies: tuple[Tensor, Tensor] | None = None
        """Set by `rounded_once`."""
        self.exchange: ExpertExchange | None = None
        """Set where ranks divide the experts (`training.parallel`)."""

    def forward(self, x_TL: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Latents [T, L], experts [T, K] int64 and their weights [T, K] fp32 → Σ_k gate · expert(latent), [T, L]."""
        return eager_experts(self, x_TL, chosen_TK, gates_TK)


@contextmanager
def rounded_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within, the experts' weights must not change, and copies in `dtype` stand for them: rounding billions of weights
    anew for every micro-batch takes longer than the memory for the copies is worth. A backward pass brings a copy's
    gradient in `dtype`, which is added to the weight's as it is: converted first, it would be written and read once
    more. So a micro-batch must have a backward pass of its own, or several would be added up in `dtype`."""
    all_experts = [module for module in model.modules() if isinstance(module, Experts)]
    for experts in all_experts:
        experts.copies = _rounded(experts.gate_up_proj, dtype), _rounded(experts.down_proj, dtype)
    try:
        yield
    finally:
        for experts in all_experts:
            experts.copies = None


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf whose gradients go to `weight`."""

    def hand_over(copy: Tensor) -> None:
        grad, copy.grad = copy.grad, None
        if grad is not None:
            weight.grad = grad.to(weight.dtype) if weight.grad is None else weight.grad.add_(grad)

    copy = weight.detach().to(dtype).requires_grad_(weight.requires_grad)
    if copy.requires_grad:
        copy.register_post_accumulate_grad_hook(hand_over)
    return copy


class LatentMoE(nn.Module):
    """A feed-forward sublayer of experts, [B, T, D] → [B, T, D], without its norms."""

    def __init__(self, config: MaiThinkingConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.latent_down = nn.Linear(config.hidden_size, config.latent_size, bias=False)
        self.experts = Experts(config)
        self.latent_up = residual_projection(config.latent_size, config.hidden_size)

    def forward(
        self, x_BTD: Tensor, token_mask_BT: Tensor | None = None, chosen_BTK: Tensor | None = None
    ) -> tuple[Tensor, Routing, Tensor]:
        """→ output [B, T, D], the routing's sums over real tokens, experts [B, T, K].

        `token_mask_BT` (bool) marks real tokens; padding is computed like any token but not counted. `chosen_BTK`
        (int64, as returned) are experts to use in place of the router's choice; their weights are the router's still.
        """
        replayed_TK = None if chosen_BTK is None else chosen_BTK.flatten(0, -2)
        gates_TK, chosen_TK, logits_TE, probabilities_TE = self.router(x_BTD.flatten(0, -2), replayed_TK)
        latents_TL = self.latent_down(x_BTD.to(weight_dtype(self.latent_down, self.config))).flatten(0, -2)
        mixed_TL = self.experts(latents_TL, chosen_TK, gates_TK)
        out_BTD = self.latent_up(mixed_TL).view(x_BTD.shape)
        routing = summarize(chosen_TK, logits_TE, probabilities_TE, token_mask_BT)
        return out_BTD, routing, chosen_TK.view(*x_BTD.shape[:-1], -1)


def summarize(chosen_TK: Tensor, logits_TE: Tensor, probabilities_TE: Tensor, token_mask_BT: Tensor | None) -> Routing:
    """One layer's routing, summed over the real tokens."""
    if token_mask_BT is not None:
        real = token_mask_BT.flatten()
        if real.is_cuda:
            return _summarize_masked(chosen_TK, logits_TE, probabilities_TE, real.float())
        chosen_TK, logits_TE, probabilities_TE = chosen_TK[real], logits_TE[real], probabilities_TE[real]
    log_z_T = logits_TE.logsumexp(dim=-1)
    with torch.no_grad():
        counts_E = torch.zeros(logits_TE.size(-1), device=logits_TE.device)
        counts_E.index_add_(0, chosen_TK.flatten(), torch.ones(chosen_TK.numel(), device=logits_TE.device))
        # H = −Σ p·log p = log Z − Σ p·logit
        entropy = log_z_T.sum() - (probabilities_TE * logits_TE).sum()
        tokens = torch.full((), chosen_TK.size(0), dtype=torch.float32, device=logits_TE.device)
    return Routing(counts_E, probabilities_TE.sum(dim=0), log_z_T.square().sum(), entropy, tokens)


def _summarize_masked(chosen_TK: Tensor, logits_TE: Tensor, probabilities_TE: Tensor, real_T: Tensor) -> Routing:
    """The same with 1 for real tokens and 0 for others: taking rows out would make a GPU wait for their number."""
    log_z_T = logits_TE.logsumexp(dim=-1)
    with torch.no_grad():
        counts_E = torch.zeros(logits_TE.size(-1), device=logits_TE.device)
        counts_E.index_add_(0, chosen_TK.flatten(), real_T.repeat_interleave(chosen_TK.size(1)))
        entropy = ((log_z_T - (probabilities_TE * logits_TE).sum(dim=-1)) * real_T).sum()
    with torch.autocast(real_T.device.type, enabled=False):  # which would round the product
        probabilities_E = real_T @ probabilities_TE
    return Routing(counts_E, probabilities_E, (log_z_T.square() * real_T).sum(), entropy, real_T.sum())


def balance_loss(counts_ME: Tensor, probabilities_ME: Tensor, tokens: Tensor | float) -> Tensor:
    """GShard's load-balance loss, E · Σ_e f_e · P_e, summed over the MoE layers (M); a scalar, M when uniform.

    f_e is expert e's share of all choices in `counts_ME`, P_e = `probabilities_ME` / `tokens` its mean probability. The
    report takes f over all ranks and micro-batches of a global batch (§2.1): hand in their counts, this micro-batch's
    probabilities and the global number of tokens, and the micro-batches' losses add up to the global batch's. The sum
    over layers, not the mean, keeps the pull on each router independent of depth.
    """
    shares_ME = counts_ME / counts_ME.sum(dim=-1, keepdim=True)
    return counts_ME.size(-1) * (shares_ME * probabilities_ME).sum() / tokens
