"""The engine against `generate`, against itself in other batches, and against the learner."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import mai_thinking.rl.engine.decode_backends as backends_module
import mai_thinking.rl.engine.engine as engine_module
from mai_thinking.errors import RunError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.rl.engine import BatchedEngine
from mai_thinking.rl.nuclei import bits_of
from mai_thinking.rl.packing import pack
from mai_thinking.rl.policy import response_logprobs
from mai_thinking.rl.rollout import Rollout
from tiny_models import tiny_model


def requests(groups: int = 6, size: int = 4, seed: int = 0) -> list[Rollout]:
    """Prompts shorter and longer than the window (8), responses of up to 30 tokens."""
    rng = np.random.default_rng(seed)
    made: list[Rollout] = []
    for _ in range(groups):
        prompt = rng.integers(2, 97, size=rng.integers(1, 20)).tolist()
        for _ in range(size):
            made.append(Rollout(100 + len(made), prompt, int(rng.integers(1, 31))))
    return made


def engine(model: MaiThinkingForCausalLM, **changes: Any) -> BatchedEngine:
    settings: dict[str, Any] = {"slots": 7, "temperature": 0.8, "top_p": 0.9, "seed": 5, "end_of_text": 0}
    return BatchedEngine(model, **(settings | changes))


def same(one: Rollout, other: Rollout) -> bool:
    return (
        one.id == other.id
        and one.finished == other.finished
        and all(
            np.array_equal(getattr(one, part), getattr(other, part)) for part in ("response_ids", "nuclei", "experts")
        )
    )


@pytest.mark.parametrize("offset", [False, True])
def test_greedy_equals_generate_with_ragged_prompts(offset: bool) -> None:
    model = tiny_model(offset_keys=offset)
    wanted = requests(groups=9, size=1)
    results = engine(model, slots=4, temperature=0.0).generate(wanted)
    ended = 0
    for request, rollout in zip(wanted, results, strict=True):
        settings = GenerationConfig(
            max_new_tokens=request.max_new_tokens, do_sample=False, eos_token_id=0, pad_token_id=1
        )
        prompt = torch.tensor([request.prompt_ids])
        generated = model.generate(prompt, generation_config=settings)[0, prompt.size(1) :].tolist()
        assert rollout.response_ids.tolist() == generated
        assert rollout.finished == (generated[-1] == 0)
        ended += rollout.finished
    assert max(len(rollout.response_ids) for rollout in results) > 8  # past the window


def test_the_batch_changes_no_draw() -> None:
    """One slot, few, more than there are requests; and another order, with other requests in between."""
    model, wanted = tiny_model(), requests()
    alone = engine(model, slots=1).generate(wanted)
    for slots in (3, 7, 64):
        for one, other in zip(alone, engine(model, slots=slots).generate(wanted), strict=True):
            assert same(one, other)
            assert np.abs(one.logprobs - other.logprobs).max() < 1e-5
    mixed = [request for pair in zip(reversed(wanted), _renamed(requests(seed=9)), strict=True) for request in pair]
    for one, other in zip(alone, reversed(engine(model).generate(mixed)[::2]), strict=True):
        assert same(one, other)
    ends = {rollout.finished for rollout in alone}
    assert ends == {True, False}  # both ways of ending occur above


def _renamed(made: list[Rollout]) -> list[Rollout]:
    return [Rollout(request.id + 1000, request.prompt_ids, request.max_new_tokens) for request in made]


def test_the_same_seed_gives_the_same_bits() -> None:
    model, wanted = tiny_model(), requests()
    first, again = engine(model).generate(wanted), engine(model).generate(wanted)
    assert all(
        same(*pair) and np.array_equal(pair[0].logprobs, pair[1].logprobs) for pair in zip(first, again, strict=True)
    )
    other = engine(model, seed=6).generate(wanted)
    assert sum(same(*pair) for pair in zip(first, other, strict=True)) < len(wanted) / 2


def test_shapes_and_contents() -> None:
    model, wanted = tiny_model(), requests()
    for request, rollout in zip(wanted, engine(model).generate(wanted), strict=True):
        n = len(rollout.response_ids)
        assert 1 <= n <= request.max_new_tokens
        assert rollout.prompt_ids == request.prompt_ids
        assert rollout.logprobs.shape == (n,)
        bits = bits_of(rollout.nuclei, len(rollout.response_ids))
        assert bits.shape == (n, 13)
        assert rollout.experts.shape == (3, len(request.prompt_ids) + n - 1, 3)
        assert rollout.experts.dtype == np.uint16
        inside = np.unpackbits(bits, axis=1, bitorder="little", count=97)
        assert inside[np.arange(n), rollout.response_ids].all()
        assert rollout.finished == (rollout.response_ids[-1] == 0)
        assert (rollout.response_ids[:-1] != 0).all()


def test_a_shared_prompt_goes_through_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    prefill = engine_module.prefill

    def counting(model: MaiThinkingForCausalLM, prompts: Sequence[Sequence[int]]) -> Any:
        seen.extend(tuple(prompt) for prompt in prompts)
        return prefill(model, prompts)

    monkeypatch.setattr(engine_module, "prefill", counting)
    wanted = requests(groups=3, size=8)
    engine(tiny_model(), slots=3).generate(wanted)
    assert sorted(seen) == sorted({tuple(request.prompt_ids) for request in wanted})


def largest_difference(
    model: MaiThinkingForCausalLM, made: list[Rollout], temperature: float = 0.8, **replays: bool
) -> float:
    """max |Δ log p| of the learner, whose rows are packed, against the engine."""
    worst = 0.0
    for batch in pack(made, row_length=96, rows=3, num_experts=model.config.num_experts):
        with torch.no_grad():
            logprobs_N, _ = response_logprobs(model, batch, temperature=temperature, **replays)
        worst = max(worst, float((logprobs_N - batch["old_logprobs"]).abs().max()))
    return worst


def test_learner_and_engine_agree_with_both_replays() -> None:
    """Routers come in pairs of experts that all but tie, as happens among 512 in long runs: rounding then chooses, and
    differs between a packed row and a batch of slots."""
    model = tiny_model(num_experts=32, experts="bucketed_mm")
    with torch.no_grad():
        for layer in model.model.layers[1::2]:
            router = layer.feed_forward.router.weight
            router[16:] = router[:16]
            router[16:, 0] *= 1 + 1e-6
    wanted = requests(groups=12)
    figures = {"both": 0.0, "without nucleus": 0.0, "without experts": 0.0}
    for slots in (2, 7, 64):
        made = engine(model, slots=slots).generate(wanted)
        figures["both"] = max(figures["both"], largest_difference(model, made))
        nucleus = largest_difference(model, made, replay_nucleus=False)
        experts = largest_difference(model, made, replay_experts=False)
        figures["without nucleus"] = max(figures["without nucleus"], nucleus)
        figures["without experts"] = max(figures["without experts"], experts)
    print("max |Δ log p| learner against engine:", figures)
    assert figures["both"] <= 1e-4
    assert figures["without nucleus"] > 0.05
    assert figures["without experts"] > 0.01


def test_weights_are_those_of_the_last_update() -> None:
    model, wanted = tiny_model(), requests()
    mine = engine(model)
    before = mine.generate(wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert all(same(*pair) for pair in zip(before, mine.generate(wanted), strict=True))
    mine.update_weights(model)
    after = mine.generate(wanted)
    assert largest_difference(model, after) <= 1e-4
    assert largest_difference(model, before) > 1e-2


def test_each_call_may_have_another_temperature() -> None:
    """As an evaluation has between two fillings of the buffer: what comes before and after is not disturbed."""
    model, wanted = tiny_model(), requests(groups=2)
    for backend in ("eager", "static"):
        mine = engine(model, backend=backend)
        for temperature in (0.0, 1.3, None):
            own = engine(model, backend=backend, temperature=0.8 if temperature is None else temperature)
            asked = mine.generate(wanted, temperature)
            assert all(
                same(*pair) and np.array_equal(pair[0].logprobs, pair[1].logprobs)
                for pair in zip(own.generate(wanted), asked, strict=True)
            )


def failing(times: int, error: Exception | None) -> Callable[..., Any]:
    """`decode` that, from its tenth call on, `times` times raises or returns NaN."""
    decode, calls = backends_module.decode, [0]

    def faulty(*arguments: Any) -> Any:
        calls[0] += 1
        hidden_AD, experts = decode(*arguments)
        if 10 <= calls[0] < 10 + times:
            if error is not None:
                raise error
            hidden_AD = hidden_AD.clone()
            hidden_AD[-1] = float("nan")
        return hidden_AD, experts

    return faulty


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), None])
def test_a_failed_generation_is_retried(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted = tiny_model(), requests()
    undisturbed = engine(model).generate(wanted)
    monkeypatch.setattr(backends_module, "decode", failing(2, error))
    retried = engine(model).generate(wanted)
    assert all(same(*pair) for pair in zip(undisturbed, retried, strict=True))


@pytest.mark.parametrize(
    ("error", "named"), [(RuntimeError("no memory"), "no memory"), (None, r"rollout 1\d\d.*not finite")]
)
def test_a_generation_that_keeps_failing_is_an_error(
    error: Exception | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends_module, "decode", failing(10**9, error))
    with pytest.raises(RunError, match=f"failed 3 times.*{named}") as raised:
        engine(tiny_model()).generate(requests())
    assert "\n" not in str(raised.value)


def test_nothing_asked_is_nothing_answered() -> None:
    assert engine(tiny_model()).generate([]) == []
