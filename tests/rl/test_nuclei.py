"""Nuclei that wait for their replay come back bit for bit, in the room that their ids would take."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mai_thinking.errors import UsageError
from mai_thinking.rl.nuclei import bits_of, shrink
from mai_thinking.rl.rollout import Group, Rollout


@st.composite
def bits(draw: st.DrawFn, vocab: int = 203) -> np.ndarray:
    """Some nuclei of a few tokens, some of nearly all."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 6, 7, 40, vocab]), min_size=1, max_size=6))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    mask = np.zeros((len(sizes), vocab), dtype=bool)
    for row, size in zip(mask, sizes, strict=True):
        row[generator.permutation(vocab)[:size]] = True
    return np.packbits(mask, axis=1, bitorder="little")


def rollout_of(parts: list[np.ndarray]) -> Rollout:
    count = sum(map(len, parts))
    return Rollout(
        0,
        [1],
        9,
        response_ids=np.zeros(count, dtype=np.int64),
        logprobs=np.zeros(count, dtype=np.float32),
        nuclei=tuple(map(shrink, parts)),
        experts=np.zeros((1, count, 1), dtype=np.uint16),
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(bits(), min_size=1, max_size=3), min_size=1, max_size=3))
def test_what_goes_in_comes_out(rollouts: list[list[np.ndarray]]) -> None:
    """Also of a group that was in a checkpoint."""
    kept = Group.from_state(Group(0, 0, "kept", [rollout_of(parts) for parts in rollouts]).state_dict())
    for rollout, parts in zip(kept.rollouts, rollouts, strict=True):
        back = bits_of(rollout.nuclei, len(rollout.response_ids))
        np.testing.assert_array_equal(back, np.concatenate(parts))


@pytest.mark.parametrize(("tokens", "most"), [(8, 32), (40, 160), (200_019, 25_003)])
def test_they_take_no_more_room_than_ids_or_bits(tokens: int, most: int) -> None:
    """A report-sized vocabulary: eight ids are 32 bytes, where bits are 25,003."""
    mask = np.zeros((64, 200_019), dtype=bool)
    generator = np.random.default_rng(0)
    for row in mask:
        row[generator.permutation(mask.shape[1])[:tokens]] = True
    assert len(shrink(np.packbits(mask, axis=1, bitorder="little"))) <= 64 * most


def test_rollouts_of_an_earlier_version_are_refused() -> None:
    state = Group(0, 0, "kept", [rollout_of([np.ones((2, 4), dtype=np.uint8)])]).state_dict()
    state["nucleus"] = state.pop("nuclei")
    with pytest.raises(UsageError, match="earlier version; start it under another name"):
        Group.from_state(state)
