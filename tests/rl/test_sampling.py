"""Which problems go on and are kept, in both readings of the group size; when responses may become longer."""

import json
import math
import random

import pytest
from pydantic import ValidationError

from mai_thinking.config.sampling import CurriculumSection, SamplingSection
from mai_thinking.rl.sampling import GroupSampling, LengthCurriculum, SamplingCounts, Verdict


def scores(passed: int, size: int) -> list[float]:
    return [1.0] * passed + [0.0] * (size - passed)


def course(section: SamplingSection, early: int, later: int) -> GroupSampling:
    """A problem of whose early rollouts `early` pass, and `later` of the rest."""
    group = GroupSampling(section)
    group.add(scores(early, group.wanted))
    if group.wanted:
        group.add(scores(later, group.wanted))
    assert group.wanted == 0
    return group


@pytest.mark.parametrize(
    ("passed", "verdict"),
    [(0, "early_too_hard"), (1, "full"), (12, "full"), (13, "early_too_easy"), (16, "early_too_easy")],
)
def test_early_exit(passed, verdict):
    """Of 16: 1/16 = 0.0625 and 12/16 = 0.75 lie in [0.05, 0.8], 13/16 = 0.8125 does not."""
    group = GroupSampling(SamplingSection())
    assert group.wanted == 16
    assert group.add(scores(passed, 16)) == verdict
    assert group.wanted == (112 if verdict == "full" else 0)


@pytest.mark.parametrize(("passed", "verdict"), [(12, "too_hard"), (13, "kept"), (102, "kept"), (103, "too_easy")])
def test_the_whole_group_decides_with_its_early_rollouts(passed, verdict):
    """Of 128: 0.1 is 12.8 rollouts, 0.8 is 102.4."""
    group = course(SamplingSection(), early=8, later=passed - 8)
    assert (group.verdict, group.rollouts, group.pass_rate) == (verdict, 128, passed / 128)


def test_more_means_as_many_more():
    group = GroupSampling(SamplingSection(group_size_means="more"))
    group.add(scores(4, 16))
    assert group.wanted == 128
    assert group.add(scores(60, 128)) is Verdict.KEPT
    assert (group.rollouts, group.pass_rate) == (144, 64 / 144)


@pytest.mark.parametrize("passed", [1, 8])
def test_the_ends_of_a_range_belong_to_it(passed):
    section = SamplingSection(early_size=10, group_size=10, early_range=(0.1, 0.8))
    group = GroupSampling(section)
    assert group.add(scores(passed, 10)) is Verdict.KEPT  # the early rollouts are the whole group


def test_either_filter_can_be_off():
    no_early = SamplingSection(early_range=None)
    assert GroupSampling(no_early).wanted == 128
    assert GroupSampling(no_early).add(scores(0, 128)) is Verdict.TOO_HARD
    assert GroupSampling(SamplingSection(early_range=None, group_size_means="more")).wanted == 144
    assert course(SamplingSection(final_range=None), 1, 0).verdict is Verdict.KEPT
    assert course(SamplingSection(early_range=None, final_range=None), 128, 0).verdict is Verdict.KEPT


def test_rollouts_come_in_any_number_and_the_state_goes_on():
    whole = course(SamplingSection(), 3, 50)
    group = GroupSampling(SamplingSection())
    for score in [*scores(3, 16), *scores(50, 112)]:
        assert group.wanted
        group.add([score])
        state = json.loads(json.dumps(group.state_dict()))
        group = GroupSampling(SamplingSection())
        group.load_state_dict(state)
    assert group.state_dict() == whole.state_dict()
    assert group.verdict is Verdict.KEPT


def test_only_positive_rewards_pass():
    group = GroupSampling(SamplingSection(early_range=None, group_size=4))
    group.add([0.0, -1.0, 0.01, 1.0])
    assert group.pass_rate == 0.5


def test_more_rollouts_than_wanted_are_a_mistake():
    group = GroupSampling(SamplingSection())
    with pytest.raises(ValueError, match="17 rollouts for a problem that wants 16"):
        group.add(scores(0, 17))
    group.add(scores(0, 16))
    with pytest.raises(ValueError, match="wants 0"):
        group.add([1.0])


def test_what_each_rule_dropped_is_counted():
    counts = SamplingCounts()
    section = SamplingSection()
    for early, later in ((0, 0), (0, 0), (16, 0), (1, 0), (12, 112), (12, 100), (8, 40), (4, 30)):
        counts.count(course(section, early, later))
    assert counts.metrics() == {
        "groups_kept": 2,
        "groups_dropped/early_too_hard": 2,
        "groups_dropped/early_too_easy": 1,
        "groups_dropped/too_hard": 1,
        "groups_dropped/too_easy": 2,
        "rollouts_used": 2 * 128 / (3 * 16 + 5 * 128),
        "response_length/all": 0.0,
        "cut_off/all": 0.0,
        "long_share": 0.0,
        "thought_share": 0.0,
    }
    both = SamplingCounts()
    both.load_state_dict(json.loads(json.dumps(counts.state_dict())))
    both.add(counts)
    assert both.metrics() == {name: 2 * n if "groups" in name else n for name, n in counts.metrics().items()}
    with pytest.raises(ValueError, match="still wants 16"):
        counts.count(GroupSampling(section))


def test_the_report_s_lengths():
    curriculum = LengthCurriculum(CurriculumSection(max_steps=2))
    lengths = []
    for _ in range(12):
        lengths.append((curriculum.max_length, curriculum.in_last_stage, curriculum.penalises_length))
        curriculum.update(0, 10)
    assert lengths[::2] == lengths[1::2]
    expected = [(8192 * 2**stage, stage == 4, stage < 4) for stage in range(5)]
    assert lengths[::2] == [*expected, expected[-1]]


def simulated(curriculum, mean_length, steps):
    """The share of responses cut off and the limit, step by step, of a policy whose responses have `mean_length(step,
    limit)` tokens on average and spread as lengths do; half of the problems are dropped, and count all the same."""
    rng = random.Random(5)
    course = []
    for step in range(steps):
        limit = curriculum.max_length
        lengths = [rng.lognormvariate(math.log(mean_length(step, limit)), 0.3) for _ in range(256)]
        course.append((sum(length >= limit for length in lengths) / 256, limit))
        curriculum.update(sum(2 * length > limit for length in lengths), 256)
    return course


def test_a_policy_that_lengthens_never_meets_its_limit():
    """From 12 tokens to 100, as fast as a tenth in ten steps: each limit has gone before one response in a hundred is
    cut off, so nothing teaches the policy to be brief."""
    curriculum = LengthCurriculum(CurriculumSection(start=48, end=384, window=10))
    course = simulated(curriculum, lambda s, _: 12 * 1.01**s, 220)
    assert [limit for _, limit in course][-1] == 384
    assert max(share for share, _ in course) < 0.01


def test_a_policy_that_avoids_its_limit_still_moves_on():
    """It would write 80 tokens and has learned to stay below three quarters of what it may: nothing is cut off, and a
    rule that waited for cut-offs would wait for ever."""
    course = simulated(
        LengthCurriculum(CurriculumSection(start=32, end=256, window=10)), lambda _, limit: min(80, 0.5 * limit), 80
    )
    assert [limit for _, limit in course][-1] == 256
    assert course[-1][0] == 0


def test_a_policy_that_shortens_keeps_its_limit():
    curriculum = LengthCurriculum(CurriculumSection(start=64, end=512, window=10))
    course = simulated(curriculum, lambda s, _: 20 * 0.98**s, 100)
    assert {limit for _, limit in course} == {64}


def test_a_policy_that_never_ends_goes_through_all_limits():
    """A window a stage: there is no length at which it would be told apart from one that needs the room."""
    course = simulated(LengthCurriculum(CurriculumSection(start=16, end=128, window=5)), lambda *_: 1e4, 30)
    assert [limit for _, limit in course][:21:5] == [16, 32, 64, 128, 128]


def test_moves_on_when_responses_no_longer_fit():
    curriculum = LengthCurriculum(CurriculumSection(start=32, end=64, window=4, long_share=0.25))
    assert not any(curriculum.update(cut, 8) for cut in (8, 8, 8))  # the window is not full
    curriculum = LengthCurriculum(CurriculumSection(start=32, end=64, window=4, long_share=0.25))
    assert not any(curriculum.update(cut, 8) for cut in (0, 8, 0, 0, 0, 0, 3, 3, 2))  # never more than 8 of 32
    assert curriculum.long_share == 0.25
    assert curriculum.update(3, 8)  # 11 of 32
    assert (curriculum.max_length, curriculum.in_last_stage, curriculum.long_share) == (64, True, 0.0)
    assert not any(curriculum.update(8, 8) for _ in range(20))  # there is no longer stage
    assert curriculum.max_length == 64


def test_a_stage_lasts_its_least_steps_and_starts_its_window_afresh():
    section = CurriculumSection(start=1, end=8, window=2, min_steps=5)
    curriculum = LengthCurriculum(section)
    moves = [curriculum.update(1, 1) for _ in range(11)]
    assert [step for step, moved in enumerate(moves, 1) if moved] == [5, 10]


def test_one_stage_charges_for_length_only_if_asked():
    assert not LengthCurriculum(CurriculumSection(start=96, end=96)).penalises_length
    section = CurriculumSection(start=96, end=96, penalty_in_last_stage=True)
    assert LengthCurriculum(section).penalises_length


def test_the_curriculum_resumes_exactly():
    section = CurriculumSection(start=16, end=256, window=3, long_share=0.3, max_steps=9)
    steady, broken = LengthCurriculum(section), LengthCurriculum(section)
    for step in range(60):
        cut = step * 7 % 5
        assert steady.update(cut, 8) == broken.update(cut, 8)
        state = json.loads(json.dumps(broken.state_dict()))
        broken = LengthCurriculum(section)
        broken.load_state_dict(state)
        assert broken.state_dict() == steady.state_dict()
    assert steady.stage > 2


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (SamplingSection, {"early_range": (0.8, 0.1)}, "early_range: 0.8 is more than 0.1"),
        (SamplingSection, {"final_range": (0.1, 80)}, "less than or equal to 1"),
        (SamplingSection, {"early_size": 200}, "early_size: 200 is more than the 128"),
        (CurriculumSection, {"start": 10, "end": 30}, "end: 30 is not start 10 doubled"),
        (CurriculumSection, {"start": 10, "end": 5}, "end: 5 is not start 10 doubled"),
        (CurriculumSection, {"long_share": None}, "no rule for moving on"),
        (CurriculumSection, {"min_steps": 9, "max_steps": 8}, "max_steps: 8 is less than min_steps 9"),
    ],
)
def test_settings_without_sense_are_refused(kind, changes, message):
    with pytest.raises(ValidationError, match=message):
        kind(**changes)


def test_the_old_word_for_the_rule_is_told():
    with pytest.raises(ValidationError, match="cut_off_share: is `long_share` now"):
        CurriculumSection(cut_off_share=0.1)
