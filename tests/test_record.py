"""The record table: what a trial gained, and which samples count as Python."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from record import compare

from mai_thinking.training.sampling import parses


def line(name: str, tokens: int, seed: int, weighted: float, seconds: float) -> str:
    return json.dumps(
        {"name": name, "what": name, "tokens": tokens, "seed": seed, "weighted": weighted, "seconds": seconds}
        | {"bits": {"code": weighted}}
    )


def test_gains_are_of_pairs_and_a_slower_step_is_charged_for(tmp_path: Path) -> None:
    """The baseline gains 0.4 with each doubling of its tokens; the trial gains 0.5 and takes √2 of the time."""
    lines = [line("base", 100, seed, 3.0 + seed, 10.0) for seed in (0, 1)]
    lines += [line("base", 400, 0, 2.7, 40.0)]
    lines += [line("try", 100, seed, 2.5 + seed + 0.1 * seed, 10.0 * 2**0.5) for seed in (0, 1)]
    (tmp_path / "trials.jsonl").write_text("\n".join([*lines, line("unpaired", 50, 0, 1.0, 1.0)]))
    (row,) = compare(tmp_path / "trials.jsonl")
    assert (row["tried"], row["seeds"]) == ("try", 2)
    assert row["gain"] == pytest.approx(0.45)
    assert row["low"] < 0.4 < 0.5 < row["high"]
    assert row["at equal time"] == pytest.approx(0.45 - 0.5 * (3.5 - 2.7) / 2)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("def f(x):\n    return x\n\nclass Broken((:\n", True),  # what follows the function is not looked at
        ("def f(x):\n    return x\n    y = (", True),  # nor a last line that may not be whole
        ("def f(x:\n    return x\n", False),
        ("def f(x):\nreturn x\n", False),
        ("def ", False),
    ],
)
def test_a_sample_is_its_first_function(text: str, good: bool) -> None:
    assert parses(text) is good
