"""Nuclei that wait for their replay come back bit for bit, in the room that their ids take."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mai_thinking.config.run import CheckpointSection
from mai_thinking.rl.nuclei import WIDE, Nuclei
from mai_thinking.training.checkpoint import Checkpointer


@st.composite
def bits(draw: st.DrawFn, vocab: int = 203) -> np.ndarray:
    """Some nuclei of a few tokens, some of nearly all."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 6, 7, 40, vocab]), max_size=6))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    mask = np.zeros((len(sizes), vocab), dtype=bool)
    for row, size in zip(mask, sizes, strict=True):
        row[generator.permutation(vocab)[:size]] = True
    return np.packbits(mask, axis=1, bitorder="little")


@settings(deadline=None, max_examples=40)
@given(st.lists(bits(), min_size=1, max_size=4))
def test_what_goes_in_comes_out(parts: list[np.ndarray]) -> None:
    whole = Nuclei.joined([Nuclei.of(part) for part in parts])
    kept = Nuclei.from_state(whole.state_dict())
    if len(kept):
        np.testing.assert_array_equal(kept.unpacked(), np.concatenate(parts))
    for part, back in zip(parts, kept.split([len(part) for part in parts]), strict=True):
        assert len(back) == len(part)
        np.testing.assert_array_equal(back.unpacked()[: len(part)], part)


def room(nuclei: Nuclei) -> int:
    return nuclei.sizes.nbytes + nuclei.ids.nbytes + nuclei.bits.nbytes


def test_few_take_little_and_many_no_more_than_their_bits() -> None:
    """A report-sized vocabulary: eight ids are 32 bytes, where bits are 25,003."""
    mask = np.zeros((100, 200_019), dtype=bool)
    mask[:, 7 * np.arange(8)] = True
    assert room(Nuclei.of(np.packbits(mask, axis=1, bitorder="little"))) == 100 * (4 * 8 + 4)
    mask[0] = True
    one_wide = Nuclei.of(np.packbits(mask, axis=1, bitorder="little"))
    assert one_wide.sizes[0] == WIDE
    assert room(one_wide) == 100 * 4 + 99 * 4 * 8 + 25_003


def test_a_checkpoint_holds_them_where_there_is_no_id(tmp_path: Path) -> None:
    wide = Nuclei.of(np.full((3, 26), 0xFF, dtype=np.uint8))
    assert not len(wide.ids)
    writer = Checkpointer(tmp_path, CheckpointSection())
    writer.save(1, {"nuclei": wide.state_dict()}, synchronous=True)
    writer.close()
    state = {"nuclei": Nuclei.none().state_dict()}
    assert Checkpointer(tmp_path, CheckpointSection()).load_latest(state) == 1
    assert Nuclei.from_state(state["nuclei"]) == wide
