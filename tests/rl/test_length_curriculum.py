"""When responses may become longer."""

import json
import math
import random

import pytest
from pydantic import ValidationError

from mai_thinking.config.grpo import CurriculumSection
from mai_thinking.rl.length_curriculum import LengthCurriculum


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
    ("changes", "message"),
    [
        ({"start": 10, "end": 30}, "end: 30 is not start 10 doubled"),
        ({"start": 10, "end": 5}, "end: 5 is not start 10 doubled"),
        ({"long_share": None}, "no rule for moving on"),
        ({"min_steps": 9, "max_steps": 8}, "max_steps: 8 is less than min_steps 9"),
    ],
)
def test_settings_without_sense_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        CurriculumSection(**changes)
