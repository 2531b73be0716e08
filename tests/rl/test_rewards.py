"""Rewards worked out by hand from the report's formula."""

import pytest
from pydantic import ValidationError

import mai_thinking.rl.rewards as rewards_module
from mai_thinking.config.tasks import RewardSection, TaskSection
from mai_thinking.rl.rewards import GradedGroup, Term, combine, group_rewards, task_rewards
from mai_thinking.rl.tasks import WRONG, Grade

RUSSIAN = "слово "
RIGHT = Grade(1.0, True)


def task(combination: str, *graders: dict[str, object]) -> TaskSection:
    return TaskSection.model_validate(
        {"name": "x", "kind": "sum", "combination": combination, "graders": [{"pattern": "x"} | g for g in graders]}
    )


def test_a_group_by_hand() -> None:
    """Half a score is no verdict, and a verdict no score."""
    grades = [RIGHT, WRONG, Grade(0.5, False), Grade(0.0, True)]
    group = GradedGroup(grades, ["Good.", RUSSIAN * 10, "", RUSSIAN * 300], [50, 100, 10, 0], 100)
    assert group.pass_rate == 0.5
    parts = group_rewards(group, RewardSection())
    assert [part["task"] for part in parts] == [1, 0, 0.5, 0]
    assert [part["language"] for part in parts] == pytest.approx([1, 0.95, 1, 0])
    assert [part["length"] for part in parts] == pytest.approx([0.25, 0.5, 0.05, 0])
    by_hand = [1 + 0.5 - 0.0625, 0.475 - 0.125, 0.5 + 0.5 - 0.0125, 0]
    assert [part["total"] for part in parts] == pytest.approx(by_hand)


def test_a_weight_of_zero_switches_a_term_off() -> None:
    section = RewardSection(w_language=0, w_length=0)
    (part,) = group_rewards(GradedGroup([Grade(0.75, True)], [RUSSIAN], [90], 100), section)
    assert part == {"task": 0.75, "language": 0, "length": 0, "total": 0.75}
    (part,) = group_rewards(GradedGroup([RIGHT], [RUSSIAN * 500], [100], 100), RewardSection(alpha=0))
    assert part["total"] == 1 + 0.5 - 0.25


def test_an_unsolved_problem_has_no_length_penalty() -> None:
    group = GradedGroup([WRONG, Grade(0.5, False)], ["", ""], [10, 90], 100)
    assert [part["total"] for part in group_rewards(group, RewardSection())] == [0.5, 1.0]


def test_uneven_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="0 grades"):
        group_rewards(GradedGroup([], [], [], 1), RewardSection())
    with pytest.raises(ValueError, match="1 thoughts"):
        group_rewards(GradedGroup([RIGHT, WRONG], ["a"], [1, 1], 1), RewardSection())
    with pytest.raises(ValidationError):
        RewardSection(w_length=-0.1)


def test_a_term_more_is_a_function_and_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    class Section(RewardSection):
        w_rare: float = 2.0

    def rare(group: GradedGroup, section: RewardSection) -> list[float]:
        """Compares the rollouts of a group with each other."""
        return [1 / group.thoughts.count(thought) for thought in group.thoughts]

    monkeypatch.setitem(rewards_module.TERMS, "rare", Term(+1, rare))
    group = GradedGroup([WRONG] * 3, ["a", "a", "b"], [1] * 3, 1)
    rewards = group_rewards(group, Section(w_language=0))
    assert [(part["rare"], part["total"]) for part in rewards] == [(0.5, 1), (0.5, 1), (1, 2)]


def test_a_failed_gate_gives_the_minimum_whatever_else_was_earned() -> None:
    """Not even the language and the length of an answer that passes no gate are paid."""
    failed = WRONG._replace(gate_failed=True)
    group = GradedGroup([failed, WRONG, RIGHT, failed], ["Good."] + [RUSSIAN * 999] * 3, [1, 100, 100, 100], 100)
    totals = [part["total"] for part in group_rewards(group, RewardSection())]
    assert totals[0] == totals[3] == -0.25
    assert totals[0] < min(totals[1:3])
    off = group_rewards(group, RewardSection(w_language=0, w_length=0))
    assert [part["total"] for part in off] == [0, 0, 1, 0]


def test_the_sum_of_graders() -> None:
    section = task("sum", {"weight": 2}, {})
    assert combine(RIGHT, [False, True], section) == Grade(0.5, True)
    # The form alone earns something, and solves nothing.
    assert combine(WRONG, [True, True], section) == Grade(0.75, False)
    assert combine(Grade(0.6, True), [True, False], section) == Grade(0.65, True)
    assert combine(RIGHT, [], task("sum")) == RIGHT


def test_a_grader_may_pass_an_answer() -> None:
    section = task("sum", {"passes": True}, {})
    assert combine(WRONG, [True, False], section) == Grade(1 / 3, True)
    assert combine(WRONG, [False, True], section) == Grade(1 / 3, False)


def test_a_gate() -> None:
    section = task("gate", {}, {})
    assert combine(Grade(0.75, True), [True, True], section) == Grade(0.75, True)
    assert combine(RIGHT, [True, False], section) == Grade(0, False, gate_failed=True)
    assert combine(RIGHT, [], task("gate")) == RIGHT


def test_a_second_grade_acts_only_where_the_whole_group_ties() -> None:
    section = task("lexicographic", {}, {})
    right, also_right = combine(RIGHT, [False, True], section), combine(RIGHT, [False, False], section)
    wrong, better = combine(WRONG, [True, True], section), combine(WRONG, [True, False], section)
    assert [grade.passed for grade in (right, also_right, wrong, better)] == [True, True, False, False]
    assert task_rewards([right, also_right, wrong, better]) == [1, 1, 0, 0]
    assert task_rewards([right, also_right]) == [1, 0]  # the first grader ties as well, the second does not
    assert task_rewards([wrong, better]) == [1, 0]
    assert task_rewards([wrong, wrong]) == [0, 0]
    assert task_rewards([right, right]) == [1, 1]
    assert task_rewards([wrong, WRONG]) == [1, 0]  # the second gave no answer
