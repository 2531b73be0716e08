"""Rows against the plain definition: shuffled documents end to end, cut every T tokens."""

from itertools import pairwise

import numpy as np
import pytest

from mai_thinking.data.packing import PreparedRows, positions
from mai_thinking.data.prepared import PreparedSource

END = 0


def make(lengths: list[int], T: int, seed: int = 3) -> tuple[PreparedRows, list[tuple[int, ...]]]:
    """Documents whose tokens are all different from each other's, and their rows."""
    documents, first = [], 1
    for length in lengths:
        documents.append((END, *range(first, first + length - 1)))
        first += length
    tokens = np.concatenate([np.array(document, dtype=np.uint16) for document in documents])
    offsets = np.cumsum([0, *lengths])
    ids = [f"d{i}" for i in range(len(lengths))]
    return PreparedRows("s", PreparedSource(tokens, offsets, ids), context_length=T, seed=seed), documents


LENGTHS = [5, 1, 40, 7, 2, 90, 13, 3, 1, 28]


def inputs(rows: PreparedRows, tokens: int) -> list[int]:
    """The first `tokens` of the inputs of rows 0, 1, 2, … laid end to end."""
    count = -(-tokens // rows.context_length)
    return np.concatenate([rows.row(k).tokens[:-1] for k in range(count)])[:tokens].tolist()


def cut_at_ends(tokens: list[int]) -> list[tuple[int, ...]]:
    starts = [i for i, token in enumerate(tokens) if token == END] + [len(tokens)]
    return [tuple(tokens[a:b]) for a, b in pairwise(starts)]


@pytest.mark.parametrize("T", [1, 7, 64, 189])
def test_an_epoch_delivers_every_document_once_and_whole(T: int) -> None:
    rows, documents = make(LENGTHS, T)
    stream = inputs(rows, 3 * sum(LENGTHS))
    epochs = [stream[e * sum(LENGTHS) : (e + 1) * sum(LENGTHS)] for e in range(3)]
    for epoch in epochs:
        assert sorted(cut_at_ends(epoch)) == sorted(documents)
    assert epochs[0] != epochs[1] != epochs[2], "each epoch has its own order"


@pytest.mark.parametrize("T", [7, 64])
def test_every_token_is_a_label_once(T: int) -> None:
    rows, _ = make(LENGTHS, T)
    made = [rows.row(k).tokens for k in range(20)]
    assert all(len(tokens) == T + 1 for tokens in made)
    labels = np.concatenate([tokens[1:] for tokens in made])
    assert labels.tolist() == inputs(rows, 20 * T + T)[1 : 20 * T + 1]


def test_a_row_depends_on_its_number_and_the_seed_alone() -> None:
    rows, _ = make(LENGTHS, 16)
    forwards = [rows.row(k) for k in range(40)]
    fresh, _ = make(LENGTHS, 16)
    for k in (39, 0, 17, 39, 3):
        again = fresh.row(k)
        assert np.array_equal(again.tokens, forwards[k].tokens)
        assert again.document_ids == forwards[k].document_ids
    other, _ = make(LENGTHS, 16, seed=4)
    assert any(not np.array_equal(other.row(k).tokens, forwards[k].tokens) for k in range(12))


def test_document_ids_name_the_documents_of_the_inputs() -> None:
    rows, documents = make(LENGTHS, 11)
    owner = {token: f"s/d{i}" for i, document in enumerate(documents) for token in document if token != END}
    for k in range(30):
        row = rows.row(k)
        found = [owner[token] for token in row.tokens[:-1].tolist() if token != END]
        assert set(found) <= set(row.document_ids)
        # The end-of-text token does not tell its document; those of one token, or cut behind it, are the others.
        starts = (row.tokens[:-1] == END).sum() + (row.tokens[0] != END)
        assert len(row.document_ids) == starts


def test_positions_restart_at_each_document() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        tokens = generator.integers(0, 4, size=23)
        expected, position = [], -1
        for index, token in enumerate(tokens):
            position = 0 if token == END or index == 0 else position + 1
            expected.append(position)
        assert positions(tokens, END).tolist() == expected
