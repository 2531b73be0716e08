"""Static shapes against the eager backend, in fp32 and as autocast computes, and on a GPU recorded ones too."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import mai_thinking.rl.engine.decode_backends as backends_module
from mai_thinking.bench.rollout import differences
from mai_thinking.errors import RunError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.rl.engine import BatchedEngine
from mai_thinking.rl.engine.decode_backends import CudaGraphBackend, StaticBackend, padded_keys, padded_slots
from mai_thinking.rl.engine.nucleus import draw
from mai_thinking.rl.rollout import Rollout
from tiny_models import tiny_model

GPU_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 64,
    "latent_size": 32,
    "moe_intermediate_size": 32,
    "num_experts": 32,
    "initializer_range": 0.1,
}
"""Rows of multiples of 16 bytes, as a GPU's grouped products want them."""


def requests(groups: int = 6, size: int = 4, longest: int = 30) -> list[Rollout]:
    """Prompts shorter and longer than the window (8)."""
    rng = np.random.default_rng(0)
    made: list[Rollout] = []
    for _ in range(groups):
        prompt = rng.integers(2, 97, size=rng.integers(1, 20)).tolist()
        made += [Rollout(100 + len(made) + i, prompt, int(rng.integers(1, longest + 1))) for i in range(size)]
    return made


def engine(model: MaiThinkingForCausalLM, **changes: Any) -> BatchedEngine:
    settings: dict[str, Any] = {"slots": 7, "temperature": 0.8, "top_p": 0.9, "seed": 5, "end_of_text": 0}
    return BatchedEngine(model, **(settings | changes))


def same(one: Rollout, other: Rollout, tolerance: float) -> bool:
    parts = ("response_ids", "nuclei", "experts")
    return (
        one.id == other.id
        and one.finished == other.finished
        and all(np.array_equal(getattr(one, part), getattr(other, part)) for part in parts)
        and bool(np.abs(one.logprobs - other.logprobs).max() <= tolerance)
    )


def mismatch(model: MaiThinkingForCausalLM, made: list[Rollout], autocast: bool) -> tuple[float, float]:
    """Max and mean of |Δ log p| of the learner against the engine."""
    figures = differences(model, made, temperature=0.8, dtype=torch.bfloat16 if autocast else None)
    return float(figures.max()), float(figures.mean())


def test_sizes_are_few_and_large_enough() -> None:
    for slots in (1, 5, 256):
        padded = [padded_slots(A, slots) for A in range(1, slots + 1)]
        assert all(A <= R <= slots for A, R in enumerate(padded, start=1))
        assert set(padded) <= {1 << i for i in range(9)} | {slots}
    padded = [padded_keys(used, 100_000) for used in range(1, 100_001)]
    assert all(used <= size <= max(used + 127, used * 1.25) for used, size in enumerate(padded, start=1))
    assert len({size for size in padded if size <= 1024}) == 8
    assert len(set(padded)) < 40
    assert [padded_keys(used, 150) for used in (1, 128, 129, 150)] == [128, 128, 150, 150]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_static_steps_generate_what_plain_ones_do(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys padded to few, many, and all that there are."""
    model, wanted = tiny_model(), requests()
    plain = engine(model, temperature=temperature).generate(wanted)
    for slots, keys in ((1, 128), (7, 8), (64, 128)):
        monkeypatch.setattr(backends_module, "FEWEST_KEYS", keys)
        static = engine(model, temperature=temperature, slots=slots, backend="static").generate(wanted)
        assert all(same(*pair, tolerance=1e-5) for pair in zip(plain, static, strict=True))


def test_slots_that_pad_disturb_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All slots decoded at every step, most of them before their prompt comes."""
    model, wanted = tiny_model(), requests()
    plain = engine(model, slots=16).generate(wanted)
    monkeypatch.setattr(backends_module, "padded_slots", lambda in_use, slots: slots)
    static = engine(model, slots=16, backend="static").generate(wanted)
    assert all(same(*pair, tolerance=1e-5) for pair in zip(plain, static, strict=True))


def test_longer_sequences_get_new_steps_and_new_weights_do_not() -> None:
    model = tiny_model()
    mine = engine(model, backend="static")
    mine.generate(requests(longest=30))
    first = mine._backend
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    addresses = [parameter.data_ptr() for parameter in mine.model.parameters()]
    mine.update_weights(model)
    after = mine.generate(requests(longest=30))
    assert addresses == [parameter.data_ptr() for parameter in mine.model.parameters()]
    assert mine._backend is first
    assert all(
        same(*pair, tolerance=1e-5) for pair in zip(after, engine(model).generate(requests(longest=30)), strict=True)
    )
    mine.generate([Rollout(1, [5] * 5, 200)])
    assert mine._backend is not first


class Operations(TorchDispatchMode):
    """Notes what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func.overloadpacket).removeprefix("aten."))
        return func(*args, **(kwargs or {}))


WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "bincount", "lift_fresh"}
"""Operations that hand data to the host, or take it from there: no graph can have them."""


def test_no_recorded_operation_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library's experts: ours are another function on a GPU."""
    model = tiny_model(experts="grouped_mm")
    operations = Operations()

    def watched(self: StaticBackend, size: Any, work: Callable[[], None]) -> None:
        with operations:
            work()

    monkeypatch.setattr(StaticBackend, "_launch", watched)
    engine(model, backend="static").generate(requests(groups=1))
    assert {"embedding", "searchsorted", "scaled_dot_product_attention", "_grouped_mm"} <= operations.names
    assert not operations.names & WAITING
    with Operations() as others:  # the draw that may wait does so
        draw(torch.zeros(2, 97), torch.zeros(2), temperature=1.0, top_p=0.9)
    assert others.names & WAITING


def test_static_steps_name_what_is_not_finite() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="rollout 100: the logits of response token 0 are not finite"):
        engine(model, backend="static").generate(requests())


@pytest.mark.parametrize("backend", ["eager", "static"])
def test_a_copy_in_bf16_computes_what_autocast_does(backend: Any) -> None:
    """Far closer than the same weights in fp32 come to it."""
    model = tiny_model(**GPU_SIZES)
    wanted = requests()
    cast = engine(model, dtype=torch.bfloat16, backend=backend)
    assert cast.model.lm_head.weight.dtype == torch.float32
    assert {p.dtype for name, p in cast.model.named_parameters() if "norm" in name or "router" in name} == {
        torch.float32
    }
    assert {p.dtype for name, p in cast.model.named_parameters() if "proj" in name} == {torch.bfloat16}
    # The fused kernel rounds otherwise for one row than for many where a processor multiplies bf16 itself.
    with sdpa_kernel(SDPBackend.MATH):
        figures = {
            "both bf16": mismatch(model, cast.generate(wanted), autocast=True),
            "learner alone": mismatch(model, engine(model, backend=backend).generate(wanted), autocast=True),
            "both fp32": mismatch(model, engine(model, backend=backend).generate(wanted), autocast=False),
        }
    print("max and mean |Δ log p|, learner against engine:", figures)
    assert figures["both fp32"][0] < 1e-4
    assert figures["both bf16"][1] < 0.25 * figures["learner alone"][1]


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_recorded_steps_generate_what_they_do_unrecorded(temperature: float) -> None:
    """The same kernels at the same sizes: bit for bit but for what sums by atomics, hence a tolerance."""
    model, wanted = tiny_model(**GPU_SIZES).cuda(), requests(longest=150)
    settings: dict[str, Any] = {"temperature": temperature, "dtype": torch.bfloat16, "slots": 16}
    unrecorded = engine(model, backend="static", **settings).generate(wanted)
    mine = engine(model, **settings)
    for _ in range(2):  # recording, and then from the records
        recorded = mine.generate(wanted)
        alike = [same(*pair, tolerance=1e-3) for pair in zip(unrecorded, recorded, strict=True)]
        assert sum(alike) >= 0.9 * len(alike)
    assert isinstance(mine._backend, CudaGraphBackend)
    assert {size[0] for size in mine._backend._graphs} == {"decode", "draw"}


@pytest.mark.gpu
def test_recorded_steps_take_new_weights_and_longer_sequences() -> None:
    model, wanted = tiny_model(**GPU_SIZES).cuda(), requests()
    mine = engine(model, dtype=torch.bfloat16)
    mine.generate(wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    mine.update_weights(model)
    for longest in (30, 200):
        assert mismatch(model, mine.generate(requests(longest=longest)), autocast=True)[0] < 0.1


@pytest.mark.gpu
def test_bf16_engine_and_learner_agree_on_a_gpu() -> None:
    model, wanted = tiny_model(**GPU_SIZES).cuda(), requests(groups=12, longest=60)
    made = engine(model, dtype=torch.bfloat16, slots=16).generate(wanted)
    worst, mean = mismatch(model, made, autocast=True)
    print(f"|Δ log p|, learner against engine, both bf16: at most {worst}, mean {mean}")
    assert worst < 0.1
