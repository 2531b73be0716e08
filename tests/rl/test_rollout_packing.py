"""Packed rows by hand, and that nothing in a row disturbs anything else."""

import numpy as np
import pytest
import torch

from mai_thinking.errors import UsageError
from mai_thinking.rl.nuclei import shrink
from mai_thinking.rl.packing import first_fit_decreasing, pack
from mai_thinking.rl.policy import response_logprobs
from mai_thinking.rl.rollout import Rollout
from tiny_models import tiny_model


def rollout(prompt: int, response: int, seed: int = 0, *, vocab_size: int = 97, experts: int = 12) -> Rollout:
    """One of random content: 3 MoE layers, 3 experts a token, everything in the nucleus."""
    rng = np.random.default_rng([seed, prompt, response])
    places = prompt + response - 1
    chosen = np.argsort(rng.random((3, places, experts)), axis=-1)[..., :3]
    return Rollout(
        id=seed,
        max_new_tokens=response,
        prompt_ids=rng.integers(2, vocab_size, prompt).tolist(),
        response_ids=rng.integers(2, vocab_size, response),
        logprobs=rng.random(response, dtype=np.float32),
        nuclei=(shrink(np.full((response, -(-vocab_size // 8)), 255, dtype=np.uint8)),),
        experts=chosen.astype(np.uint16),
        finished=True,
    )


def test_first_fit_decreasing() -> None:
    assert first_fit_decreasing([3, 7, 5, 5, 2, 10], 10) == [[5], [1, 0], [2, 3], [4]]
    assert first_fit_decreasing([], 10) == []
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 300).tolist()
    layout = first_fit_decreasing(lengths, 100)
    assert sorted(index for row in layout for index in row) == list(range(300))
    assert all(sum(lengths[index] for index in row) <= 100 for row in layout)
    assert len(layout) <= 11 / 9 * sum(lengths) / 100 + 1  # the bound known for this rule
    with pytest.raises(UsageError, match="takes 101 places"):
        first_fit_decreasing([4, 101], 100)


def test_a_row_by_hand() -> None:
    first, second = rollout(4, 3, 1), rollout(2, 5, 2)
    (batch,) = pack([first, second], row_length=70, rows=2, num_experts=12)
    assert batch["input_ids"].shape == (1, 64)
    assert batch["input_ids"][0, :12].tolist() == [
        *first.prompt_ids,
        *first.response_ids[:2],
        *second.prompt_ids,
        *second.response_ids[:4],
    ]
    assert batch["position_ids"][0, :14].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1]
    assert batch["token_mask"][0].nonzero().squeeze(1).tolist() == list(range(12))
    assert batch["response_mask"][0].nonzero().squeeze(1).tolist() == [3, 4, 5, 7, 8, 9, 10, 11]
    assert batch["targets"].tolist() == [*first.response_ids, *second.response_ids]
    assert batch["rollout_index"].tolist() == [0] * 3 + [1] * 5
    assert batch["old_logprobs"].tolist() == [*first.logprobs, *second.logprobs]
    assert np.array_equal(batch["expert_choices"][:, 0, :6], first.experts)
    assert np.array_equal(batch["expert_choices"][:, 0, 6:12], second.experts)
    assert batch["nucleus"].shape == (8, 13)


def test_every_response_token_is_in_one_place() -> None:
    rollouts = [rollout(1 + seed % 5, 1 + seed * 7 % 40, seed) for seed in range(30)]
    batches = pack(rollouts, row_length=64, rows=3, num_experts=12)
    assert all(len(batch["input_ids"]) <= 3 for batch in batches)
    index = torch.cat([batch["rollout_index"] for batch in batches])
    targets = torch.cat([batch["targets"] for batch in batches])
    for number, one in enumerate(rollouts):
        assert targets[index == number].tolist() == one.response_ids.tolist()
    again = pack(rollouts, row_length=64, rows=3, num_experts=12)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))


def test_padding_disturbs_nobody_and_is_not_counted() -> None:
    """64 places for 12 tokens: the same as without padding, in log-probabilities and in the routing's sums."""
    model = tiny_model()
    (padded,) = pack([rollout(4, 9, 1)], row_length=64, rows=1, num_experts=12)
    (exact,) = pack([rollout(4, 9, 1)], row_length=12, rows=1, num_experts=12)
    assert padded["input_ids"].shape == (1, 64)
    assert exact["input_ids"].shape == (1, 12)
    with torch.no_grad():
        (padded_N, routing), (exact_N, exact_routing) = (
            response_logprobs(model, batch, temperature=1.0) for batch in (padded, exact)
        )
    torch.testing.assert_close(padded_N, exact_N, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routing, exact_routing, atol=1e-3, rtol=1e-4)
    assert routing.tokens.tolist() == [12.0] * 3
    assert (routing.counts_E.sum(dim=-1) == 12 * 3).all()
