"""Rewards worked out by hand from the report's formula."""

import itertools

import pytest
from pydantic import ValidationError

from mai_thinking.config.tasks import RewardSection
from mai_thinking.rl.rewards import combine, group_rewards

RUSSIAN = "слово "


def test_a_group_by_hand() -> None:
    scores, thoughts, lengths = [1.0, 0.0, 0.5, 0.0], ["Good.", RUSSIAN * 10, "", RUSSIAN * 300], [50, 100, 10, 0]
    parts, pass_rate = group_rewards(scores, thoughts, lengths, max_length=100, section=RewardSection())
    assert pass_rate == 0.5
    assert [part.task for part in parts] == scores
    assert [part.language for part in parts] == pytest.approx([1, 0.95, 1, 0])
    assert [part.length for part in parts] == pytest.approx([0.25, 0.5, 0.05, 0])
    by_hand = [1 + 0.5 - 0.0625, 0.475 - 0.125, 0.5 + 0.5 - 0.0125, 0]
    assert [part.total for part in parts] == pytest.approx(by_hand)


def test_a_weight_of_zero_switches_a_term_off() -> None:
    section = RewardSection(w_language=0, w_length=0)
    (part,), _ = group_rewards([0.75], [RUSSIAN], [90], max_length=100, section=section)
    assert (part.language, part.length, part.total) == (0, 0, 0.75)
    (part,), _ = group_rewards([1.0], [RUSSIAN * 500], [100], max_length=100, section=RewardSection(alpha=0))
    assert part.total == 1 + 0.5 - 0.25


def test_an_unsolved_problem_has_no_length_penalty() -> None:
    parts, pass_rate = group_rewards([0.0, 0.0], ["", ""], [10, 90], max_length=100, section=RewardSection())
    assert pass_rate == 0
    assert [part.total for part in parts] == [0.5, 0.5]


def test_uneven_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="without rollouts"):
        group_rewards([], [], [], max_length=1, section=RewardSection())
    with pytest.raises(ValueError, match="shorter"):
        group_rewards([1.0, 0.0], ["a"], [1, 1], max_length=1, section=RewardSection())
    with pytest.raises(ValidationError):
        RewardSection(w_length=-0.1)


def test_the_sum_of_graders() -> None:
    assert combine([1, 0.5], "sum") == 0.75
    assert combine([1, 0.5, 0], "sum", [1, 2, 1]) == 0.5
    with pytest.raises(ValueError, match="positive weight"):
        combine([1], "sum", [0])
    with pytest.raises(ValueError, match="zip"):
        combine([1, 1], "sum", [1])


def test_a_failed_gate_gives_the_minimum() -> None:
    assert combine([0.75, 1, 1], "gate") == 0.75
    assert combine([1.0, 1, 0.99], "gate") == 0
    assert combine([0.75], "gate") == 0.75


def test_lexicographic_order() -> None:
    levels = (0.0, 0.01, 0.5, 0.99, 1.0)
    vectors = sorted(itertools.product(levels, repeat=3))  # tuples are compared lexicographically
    values = [combine(vector, "lexicographic") for vector in vectors]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert values[0] == 0
    assert values[-1] == pytest.approx(1)
    assert combine([0.25], "lexicographic") == pytest.approx(0.25)


def test_no_grader_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no grader"):
        combine([], "gate")
