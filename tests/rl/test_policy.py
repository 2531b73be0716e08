"""Log-probabilities and their gradients against plain autograd, and packed against one by one."""

import numpy as np
import pytest
import torch

import mai_thinking.rl.policy as policy_module
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.model.latent_moe import balance_loss
from mai_thinking.rl.engine import BatchedEngine
from mai_thinking.rl.engine.nucleus import pack_bits
from mai_thinking.rl.packing import pack
from mai_thinking.rl.policy import response_logprobs, token_logprobs
from mai_thinking.rl.rollout import Rollout
from tiny_models import tiny_model


@pytest.mark.parametrize("share", [None, 0.003, 0.0075, 0.2])
@pytest.mark.parametrize("chunk", [1024 * 5, 2**20])
def test_token_logprobs_against_plain_autograd(
    share: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a nucleus; with narrow ones, some narrow and some not (8 of 1,024 is the limit), and wide ones."""
    monkeypatch.setattr(policy_module, "CHUNK_ELEMENTS", {"cpu": chunk})
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(43, 16, generator=generator)
    weight = torch.randn(1024, 16, generator=generator)
    targets = torch.randint(1024, (43,), generator=generator)
    mask = torch.rand(43, 1024, generator=generator) < (share or 0.0)
    mask[torch.arange(43), targets] = True
    upstream = torch.randn(43, generator=generator)
    if share == 0.0075:
        assert 0 < int((mask.sum(dim=-1) <= 8).sum()) < 43

    def plain(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logits = h @ w.T / 0.7
        if share is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        return logits.log_softmax(-1)[torch.arange(43), targets]

    def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return token_logprobs(h, w, targets, None if share is None else torch.from_numpy(pack_bits(mask)), 0.7)

    results = []
    for function in (plain, ours):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs = function(h, w)
        logprobs.backward(upstream)
        results.append((logprobs.detach(), h.grad, w.grad))
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-5)


def some_rollouts(model: MaiThinkingForCausalLM, count: int = 9) -> list[Rollout]:
    rng = np.random.default_rng(4)
    wanted = [
        Rollout(i, rng.integers(2, 97, rng.integers(2, 15)).tolist(), int(rng.integers(2, 25))) for i in range(count)
    ]
    settings = {"slots": 4, "temperature": 0.9, "top_p": 0.95, "seed": 1, "end_of_text": None}
    return BatchedEngine(model, **settings).generate(wanted)


def gradients(
    model: MaiThinkingForCausalLM, rollouts: list[Rollout], *, rows: int, alone: bool
) -> dict[str, torch.Tensor]:
    """Of a weighted sum of all log-probabilities and a share of the balance loss."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, sum(len(rollout.response_ids) for rollout in rollouts)).split(
        [len(rollout.response_ids) for rollout in rollouts]
    )
    numbered = [[index] for index in range(len(rollouts))] if alone else [list(range(len(rollouts)))]
    for indices in numbered:
        for batch in pack([rollouts[i] for i in indices], row_length=96, rows=rows, num_experts=12):
            logprobs_N, routing = response_logprobs(model, batch, temperature=0.9)
            order = [torch.tensor(indices)[batch["rollout_index"]] == i for i in range(len(rollouts))]
            objective = sum((logprobs_N[own] * weights[i]).sum() for i, own in enumerate(order) if own.any())
            # Linear in the probabilities with shares that do not depend on the cut.
            shares = torch.arange(36.0).view(3, 12)
            (objective + 1e-2 * balance_loss(shares, routing.probabilities_E, 100.0)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_packed_gradients_equal_those_one_by_one() -> None:
    model = tiny_model()
    rollouts = some_rollouts(model)
    one_by_one = gradients(model, rollouts, rows=1, alone=True)
    scale = max(float(gradient.abs().max()) for gradient in one_by_one.values())
    for rows in (1, 2, 8):
        for name, gradient in gradients(model, rollouts, rows=rows, alone=False).items():
            assert (gradient - one_by_one[name]).abs().max() <= 1e-6 * scale, name


def test_replayed_experts_are_used_and_weighed_by_the_router() -> None:
    model = tiny_model()
    (batch,) = pack(some_rollouts(model), row_length=200, rows=1, num_experts=12)
    replayed_N, routing = response_logprobs(model, batch, temperature=0.9)
    counts = torch.stack(
        [batch["expert_choices"][m][batch["token_mask"]].flatten().bincount(minlength=12) for m in range(3)]
    )
    assert torch.equal(routing.counts_E, counts.float())
    replayed_N.sum().backward()
    routers = [layer.feed_forward.router.weight.grad for layer in model.model.layers[1::2]]
    assert all(gradient.abs().max() > 0 for gradient in routers)
    others = batch["expert_choices"].add(1).remainder(12)
    batch = batch | {"expert_choices": others}
    shifted_N, _ = response_logprobs(model, batch, temperature=0.9)
    assert (shifted_N - replayed_N).abs().max() > 1e-2


def test_replay_survives_activation_checkpointing() -> None:
    model = tiny_model()
    rollouts = some_rollouts(model)
    plain = gradients(model, rollouts, rows=2, alone=False)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, rollouts, rows=2, alone=False)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_the_model_returns_the_experts_it_used() -> None:
    """Replaying a model's own choice gives its own output, bit for bit."""
    model = tiny_model()
    ids = torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        free = model(ids, output_expert_choices=True, use_cache=False)
        replayed = model(ids, expert_choices=free.expert_choices, use_cache=False)
    assert free.expert_choices.shape == (3, 2, 20, 3)
    assert torch.equal(free.logits, replayed.logits)
    assert replayed.expert_choices is None
