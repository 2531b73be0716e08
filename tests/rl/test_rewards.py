"""Rewards worked out by hand from the report's formula."""

import numpy as np
import pytest
from pydantic import ValidationError

import mai_thinking.rl.rewards as rewards_module
from mai_thinking.config.tasks import RewardSection, TaskSection
from mai_thinking.rl.rewards import TERMS, reward_group, task_rewards
from mai_thinking.rl.rollout import Call, Group, Rollout
from mai_thinking.rl.tasks import WRONG, Grade
from mai_thinking.rl.tasks.base import combine

RUSSIAN = "слово "
RIGHT = Grade(1.0, True)


def rewarded(
    section: RewardSection, grades: list[Grade], thoughts: list[str], lengths: list[int], most: int
) -> list[Rollout]:
    """A group's rollouts with their rewards."""
    rollouts = [
        Rollout(0, [1], most, response_ids=np.zeros(length, dtype=np.int64), thought=thought, grade=grade)
        for grade, thought, length in zip(grades, thoughts, lengths, strict=True)
    ]
    reward_group(Group(0, 0, rollouts=rollouts), section)
    return rollouts


def task(combination: str, *graders: dict[str, object]) -> TaskSection:
    return TaskSection.model_validate(
        {"name": "x", "kind": "sum", "combination": combination, "graders": [{"pattern": "x"} | g for g in graders]}
    )


def test_a_group_by_hand() -> None:
    """Half a score is no verdict, and a verdict no score."""
    grades = [RIGHT, WRONG, Grade(0.5, False), Grade(0.0, True)]
    made = rewarded(RewardSection(), grades, ["Good.", RUSSIAN * 10, "", RUSSIAN * 300], [50, 100, 10, 0], 100)
    assert Group(0, 0, rollouts=made).pass_rate == 0.5
    assert [one.rewards["task"] for one in made] == [1, 0, 0.5, 0]
    assert [one.rewards["language"] for one in made] == pytest.approx([1, 0.95, 1, 0])
    assert [one.rewards["length"] for one in made] == pytest.approx([0.25, 0.5, 0.05, 0])
    by_hand = [1 + 0.5 - 0.0625, 0.475 - 0.125, 0.5 + 0.5 - 0.0125, 0]
    assert [one.reward for one in made] == pytest.approx(by_hand)


def test_a_weight_of_zero_switches_a_term_off() -> None:
    (one,) = rewarded(RewardSection(w_language=0, w_length=0), [Grade(0.75, True)], [RUSSIAN], [90], 100)
    assert (one.rewards, one.reward) == (
        {**dict.fromkeys(TERMS, 0), "task": 0.75},
        0.75,
    )
    (one,) = rewarded(RewardSection(alpha=0), [RIGHT], [RUSSIAN * 500], [100], 100)
    assert one.reward == 1 + 0.5 - 0.25
    with pytest.raises(ValidationError):
        RewardSection(w_length=-0.1)


def test_an_unsolved_problem_has_no_length_penalty() -> None:
    made = rewarded(RewardSection(), [WRONG, Grade(0.5, False)], ["", ""], [10, 90], 100)
    assert [one.reward for one in made] == [0.5, 1.0]


def test_a_flat_price_on_length_does_not_ask_how_many_pass() -> None:
    made = rewarded(RewardSection(flat_length=True), [RIGHT, WRONG, WRONG, WRONG], [""] * 4, [50, 100, 10, 0], 100)
    assert [one.rewards["length"] for one in made] == pytest.approx([0.5, 1, 0.1, 0])


def test_calls_cost_where_the_problem_is_solved_and_waste_costs_always() -> None:
    """Shares by hand: of the group's most calls, times the pass rate; and of a rollout's own calls."""
    good, bad, again = (
        Call("x", "y", valid, repeated, 0) for valid, repeated in ((True, False), (False, False), (True, True))
    )
    rollouts = [Rollout(i, [2], 9, calls=calls, grade=grade) for i, (calls, grade) in enumerate(
        [((), RIGHT), ((good, good), RIGHT), ((good, bad, again, good), WRONG), ((bad,), WRONG)]
    )]  # fmt: skip
    group = Group(0, 0, rollouts=rollouts)
    reward_group(group, RewardSection(w_language=0, w_length=0, w_calls=0.5, w_waste=0.25))
    assert [one.rewards["calls"] for one in rollouts] == [0, 0.25, 0.5, 0.125]
    assert [one.rewards["waste"] for one in rollouts] == [0, 0, 0.5, 1]
    assert [one.reward for one in rollouts] == [1, 1 - 0.125, -0.25 - 0.125, -0.0625 - 0.25]


def test_a_term_more_is_a_function_and_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    class Section(RewardSection):
        w_rare: float = 2.0

    def rare(group: Group, section: RewardSection) -> list[float]:
        """Compares the rollouts of a group with each other."""
        thoughts = [rollout.thought for rollout in group.rollouts]
        return [1 / thoughts.count(thought) for thought in thoughts]

    monkeypatch.setitem(rewards_module.TERMS, "rare", (+1, rare))
    made = rewarded(Section(w_language=0), [WRONG] * 3, ["a", "a", "b"], [1] * 3, 1)
    assert [(one.rewards["rare"], one.reward) for one in made] == [(0.5, 1), (0.5, 1), (1, 2)]


def test_a_failed_gate_gives_the_minimum_whatever_else_was_earned() -> None:
    """Not even the language and the length of an answer that passes no gate are paid."""
    failed = WRONG._replace(gate_failed=True)
    group = [failed, WRONG, RIGHT, failed], ["Good."] + [RUSSIAN * 999] * 3, [1, 100, 100, 100]
    made = [one.reward for one in rewarded(RewardSection(), *group, 100)]
    assert made[0] == made[3] == -0.25
    assert made[0] < min(made[1:3])
    off = rewarded(RewardSection(w_language=0, w_length=0), *group, 100)
    assert [one.reward for one in off] == [0, 0, 1, 0]


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
