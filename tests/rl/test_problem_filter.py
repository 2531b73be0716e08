"""Which problems go on and are kept, in both readings of the group size."""

import numpy as np
import pytest
from pydantic import ValidationError

from mai_thinking.config.grpo import SamplingSection
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.rollout import Group, Rollout
from mai_thinking.rl.tasks import Grade


def rollouts(passed: int, size: int) -> list[Rollout]:
    """Whether they pass counts, whatever the score."""
    grades = [Grade(0.0, True)] * passed + [Grade(0.9, False)] * (size - passed)
    return [Rollout(0, [1], 8, grade=grade) for grade in grades]


def course(section: SamplingSection, *passed: int) -> Group:
    """A problem of which so many of each stage's rollouts pass."""
    group = Group(0, 0)
    for (size, bounds, stage), count in zip(section.stages, passed, strict=False):
        if not group.outcome:
            group.rollouts += rollouts(count, size - len(group.rollouts))
            group.judge(bounds, stage)
    return group


@pytest.mark.parametrize(
    ("passed", "outcome"),
    [(0, "early_too_hard"), (1, ""), (12, ""), (13, "early_too_easy"), (16, "early_too_easy")],
)
def test_early_exit(passed, outcome):
    """Of 16: 1/16 = 0.0625 and 12/16 = 0.75 lie in [0.05, 0.8], 13/16 = 0.8125 does not."""
    group = course(SamplingSection(), passed)
    assert (group.outcome, len(group.rollouts)) == (outcome, 16)


@pytest.mark.parametrize(("passed", "outcome"), [(12, "too_hard"), (13, ""), (102, ""), (103, "too_easy")])
def test_the_whole_group_decides_with_its_early_rollouts(passed, outcome):
    """Of 128: 0.1 is 12.8 rollouts, 0.8 is 102.4."""
    group = course(SamplingSection(), 8, passed - 8)
    assert (group.outcome, len(group.rollouts), group.pass_rate) == (outcome, 128, passed / 128)


def test_more_means_as_many_more():
    group = course(SamplingSection(group_size_means="more"), 4, 60)
    assert (group.outcome, len(group.rollouts), group.pass_rate) == ("", 16 + 128, 64 / 144)


@pytest.mark.parametrize("passed", [1, 8])
def test_the_ends_of_a_range_belong_to_it(passed):
    section = SamplingSection(early_size=10, group_size=10, early_range=(0.1, 0.8))
    group = course(section, passed, 0)
    assert (group.outcome, len(group.rollouts)) == ("", 10)  # the early rollouts are the whole group


def test_either_filter_can_be_off():
    group = course(SamplingSection(early_range=None), 0)
    assert (group.outcome, len(group.rollouts)) == ("too_hard", 128)
    ((size, _, _),) = SamplingSection(early_range=None, group_size_means="more").stages
    assert size == 144
    assert course(SamplingSection(final_range=None), 1, 0).outcome == ""
    assert course(SamplingSection(early_range=None, final_range=None), 128).outcome == ""


def test_what_each_rule_dropped_is_counted():
    counts = FilterCounts()
    section = SamplingSection()
    for early, later in ((0, 0), (0, 0), (16, 0), (1, 0), (12, 112), (12, 100), (8, 40), (4, 30)):
        group = course(section, early, later)
        group.outcome = group.outcome or "kept"
        counts.count(group)
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
    with pytest.raises(ValueError, match="undecided"):
        counts.count(Group(0, 0))


def test_lengths_and_thoughts_are_counted_of_all_responses():
    answers = [Rollout(0, [1], 8, thought=thought, answer="7", finished=True) for thought in ("So", " ")]
    for one, length in zip(answers, (4, 5), strict=True):
        one.response_ids = np.zeros(length, dtype=np.int64)
    counts = FilterCounts()
    counts.count(Group(0, 0, "too_hard", answers))
    assert [counts[name] for name in ("tokens", "long", "cut_off", "thoughts")] == [9, 1, 0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_range": (0.8, 0.1)}, "early_range\n.*is not .least, most."),
        ({"final_range": (0.1, 80)}, "less than or equal to 1"),
        ({"early_size": 200}, "early_size: 200 is more than the 128"),
    ],
)
def test_settings_without_sense_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        SamplingSection(**changes)
