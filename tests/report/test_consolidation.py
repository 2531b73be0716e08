"""What a model keeps of its specialists: shares with a closed form, and intervals that know the pairs."""

import json
from pathlib import Path

import pytest

from mai_thinking.report.consolidation import kept, write_consolidated
from mai_thinking.rl.evaluation import Answer


def answers(*passed: int) -> list[Answer]:
    return [Answer(bool(one), tokens=10 + one, foreign=not one, called=False) for one in passed]


SPECIALIST = {"tally": answers(*[1, 1, 1, 0] * 25), "cups": answers(*[1, 0] * 50)}
STUDENT = {"tally": answers(*[1, 0, 1, 0] * 25), "cups": answers(*[0, 1] * 50), "sums": answers(*[0] * 100)}


def test_kept_is_the_ratio_of_means_over_the_specialists_tasks() -> None:
    value, low, high = kept(STUDENT, SPECIALIST)
    assert value == pytest.approx((0.5 + 0.5) / (0.75 + 0.5))
    assert low < value < high
    assert kept(SPECIALIST, SPECIALIST) == (1, 1, 1)


def test_the_interval_is_that_of_pairs() -> None:
    """The same rates on other problems leave more to chance."""
    shifted = {task: [*given[1:], given[0]] for task, given in SPECIALIST.items()}
    value, low, high = kept(shifted, SPECIALIST)
    assert value == pytest.approx(1)
    assert high - low > 0.1


def test_the_page_has_each_model_on_its_tasks(tmp_path: Path) -> None:
    write_consolidated({"thinker": SPECIALIST, "student": STUDENT}, ["thinker"], tmp_path)
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert facts["kept"][0]["thinker"]["value"] == pytest.approx(0.8)
    rows = {row[""]: row for row in facts["pass@1"]}
    assert rows["sums"]["thinker"] is None
    assert rows["sums"]["student"]["value"] == 0
    assert rows["tally"]["thinker"]["value"] == 0.75
    assert facts["problems"] == {"tally": 100, "cups": 100, "sums": 100}
