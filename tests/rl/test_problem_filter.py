"""Which problems go on and are kept, in both readings of the group size."""

import numpy as np
import pytest
from pydantic import ValidationError

from mai_thinking.config.grpo import SamplingSection
from mai_thinking.rl.problem_filter import FilterCounts, ProblemFilter
from mai_thinking.rl.rollout import Group, Rollout, Verdict
from mai_thinking.rl.tasks import Grade


def rollouts(passed: int, size: int) -> list[Rollout]:
    """The verdict counts, whatever the score."""
    grades = [Grade(0.0, True)] * passed + [Grade(0.9, False)] * (size - passed)
    return [Rollout(0, [1], 8, grade=grade) for grade in grades]


def course(section: SamplingSection, early: int, later: int) -> Group:
    """A problem of whose early rollouts `early` pass, and `later` of the rest."""
    rule = ProblemFilter(section)
    group = rule.open(0, 0)
    rule.add(group, rollouts(early, rule.wanted(group)))
    if rule.wanted(group):
        rule.add(group, rollouts(later, rule.wanted(group)))
    assert rule.wanted(group) == 0
    return group


@pytest.mark.parametrize(
    ("passed", "verdict"),
    [(0, "early_too_hard"), (1, "full"), (12, "full"), (13, "early_too_easy"), (16, "early_too_easy")],
)
def test_early_exit(passed, verdict):
    """Of 16: 1/16 = 0.0625 and 12/16 = 0.75 lie in [0.05, 0.8], 13/16 = 0.8125 does not."""
    rule = ProblemFilter(SamplingSection())
    group = rule.open(0, 0)
    assert rule.wanted(group) == 16
    rule.add(group, rollouts(passed, 16))
    assert group.verdict == verdict
    assert rule.wanted(group) == (112 if verdict == "full" else 0)


@pytest.mark.parametrize(("passed", "verdict"), [(12, "too_hard"), (13, "kept"), (102, "kept"), (103, "too_easy")])
def test_the_whole_group_decides_with_its_early_rollouts(passed, verdict):
    """Of 128: 0.1 is 12.8 rollouts, 0.8 is 102.4."""
    group = course(SamplingSection(), early=8, later=passed - 8)
    assert (group.verdict, len(group.rollouts), group.pass_rate) == (verdict, 128, passed / 128)


def test_more_means_as_many_more():
    group = course(SamplingSection(group_size_means="more"), 4, 60)
    assert (group.verdict, len(group.rollouts), group.pass_rate) == ("kept", 16 + 128, 64 / 144)


@pytest.mark.parametrize("passed", [1, 8])
def test_the_ends_of_a_range_belong_to_it(passed):
    section = SamplingSection(early_size=10, group_size=10, early_range=(0.1, 0.8))
    assert course(section, passed, 0).verdict is Verdict.KEPT  # the early rollouts are the whole group


def test_either_filter_can_be_off():
    no_early = SamplingSection(early_range=None)
    group = course(no_early, 0, 0)
    assert (group.verdict, len(group.rollouts)) == (Verdict.TOO_HARD, 128)
    more = ProblemFilter(SamplingSection(early_range=None, group_size_means="more"))
    assert more.wanted(more.open(0, 0)) == 144
    assert course(SamplingSection(final_range=None), 1, 0).verdict is Verdict.KEPT
    assert course(SamplingSection(early_range=None, final_range=None), 128, 0).verdict is Verdict.KEPT


def test_rollouts_come_in_any_number():
    rule = ProblemFilter(SamplingSection())
    group = rule.open(0, 0)
    for one in [*rollouts(3, 16), *rollouts(50, 112)]:
        assert rule.wanted(group)
        rule.add(group, [one])
    assert (group.verdict, group.pass_rate) == (course(SamplingSection(), 3, 50).verdict, 53 / 128)


def test_more_rollouts_than_wanted_are_a_mistake():
    rule = ProblemFilter(SamplingSection())
    group = rule.open(0, 0)
    with pytest.raises(ValueError, match="17 rollouts for a problem that wants 16"):
        rule.add(group, rollouts(0, 17))
    rule.add(group, rollouts(0, 16))
    with pytest.raises(ValueError, match="wants 0"):
        rule.add(group, rollouts(1, 1))


def test_what_each_rule_dropped_is_counted():
    counts = FilterCounts()
    section = SamplingSection()
    for early, later in ((0, 0), (0, 0), (16, 0), (1, 0), (12, 112), (12, 100), (8, 40), (4, 30)):
        counts.count(course(section, early, later))
    size = 3 * 16 + 5 * 128
    assert counts.metrics() == {
        "groups_kept": 2,
        "groups_dropped/early_too_hard": 2,
        "groups_dropped/early_too_easy": 1,
        "groups_dropped/too_hard": 1,
        "groups_dropped/too_easy": 2,
        "rollouts_used": 2 * 128 / size,
        "response_length/all": 0.0,
        "cut_off/all": 1.0,
        "long_share": 0.0,
        "thought_share": 0.0,
    }
    with pytest.raises(ValueError, match="still wants rollouts"):
        counts.count(ProblemFilter(section).open(0, 0))


def test_lengths_and_thoughts_are_counted_of_all_responses():
    answers = [Rollout(0, [1], 8, thought=thought, answer="7", finished=True) for thought in ("So", " ")]
    for one, length in zip(answers, (4, 5), strict=True):
        one.response_ids = np.zeros(length, dtype=np.int64)
    counts = FilterCounts()
    counts.count(Group(0, 0, Verdict.TOO_HARD, answers))
    assert [counts[name] for name in ("tokens", "long", "cut_off", "thoughts")] == [9, 1, 0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_range": (0.8, 0.1)}, "early_range: 0.8 is more than 0.1"),
        ({"final_range": (0.1, 80)}, "less than or equal to 1"),
        ({"early_size": 200}, "early_size: 200 is more than the 128"),
    ],
)
def test_settings_without_sense_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        SamplingSection(**changes)
