"""Text from which nothing can be learned but to copy what stood there before."""

from collections.abc import Callable
from itertools import islice

from conftest import source
from mai_thinking.config.data import DataSection
from mai_thinking.data import prepare
from mai_thinking.data.repeats import repeated_text, repeats


def test_a_line_stands_there_twice_in_the_mean() -> None:
    for index in range(200):
        lines = repeated_text(index).splitlines()
        assert 2 * len(set(lines)) <= len(lines)


def test_a_third_reaches_back_further_than_a_local_layer_sees() -> None:
    far = 0
    for index in range(200):
        lines = repeated_text(index).splitlines()
        gap = lines[1:].index(lines[0]) + 1 if lines[0] in lines[1:] else 0
        far += sum(len(line.split()) for line in lines[:gap]) > 64  # words have two tokens or so
    assert 50 < far < 150


def test_a_document_is_a_function_of_its_number() -> None:
    found = list(islice(repeats(), 50))
    assert [document.text for document in found] == [repeated_text(index) for index in range(50)]
    assert len({document.text for document in found}) == 50


def test_cleaning_leaves_it_alone(section: Callable[..., DataSection]) -> None:
    """Near copies and lines that compress well are what it is made of."""
    made = {"kind": "embedded", "provenance": "procedural", "max_bytes": 100_000}
    config = section(source("repeats", "repeats", held_out=False, **made), source("exercises", "exercises", **made))
    counts = prepare(config).manifest["sources"]["repeats"]["counts"]
    assert counts["kept"] == counts["read"]
    assert counts["kept"][1] > 80_000
