"""Questions and answers that nobody would write on purpose: no exception, no long time, nothing paid that is not the
same. The seeds are fixed; `pytest -m slow` has a hundred times as many."""

import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mai_thinking.config.tasks import TemplateSection
from mai_thinking.data.serial import solve
from mai_thinking.rl.tasks.base import normalise, same_text
from mai_thinking.rl.tasks.mathematics import same_mathematics
from mai_thinking.rl.template import Template

FIXED = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
PAIRS = Path(__file__).parent / "math_pairs.txt"
REFERENCES = sorted({line[2:] for line in PAIRS.read_text(encoding="utf-8").splitlines() if line[0] == "="})
MARKS = (
    *"0123456789abexyzEI+-*/^_=<>()[]{}|!.,:;%$&~ \n'\"\\√πµ°²½−×≤∞∪",
    *("\\frac", "\\sqrt", "\\pm", "\\text{", "\\left(", "\\{", "\\begin{pmatrix}", "\\end{pmatrix}", "\\overline{3}"),
    *("sin", "log_", "or", "and", "to", "km", "dozen", "1e9", "10^", "9999", "January 3", "\ud83d", "\0", "١", "½"),
)
TEMPLATES = [
    Template(TemplateSection()),
    Template(TemplateSection(preset="exercise")),
    Template(TemplateSection(prompt="{question}", answer_start="=", answer_end="")),
]
formulas = st.lists(st.sampled_from(MARKS), max_size=40).map("".join)
answers = formulas | st.text(max_size=60)


@st.composite
def near(draw: st.DrawFn) -> str:
    """A reference with a few marks put in, taken out or said again."""
    text = draw(st.sampled_from(REFERENCES))
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.integers(0, len(text))), draw(st.integers(0, 3))
        text = text[:at] + draw(st.sampled_from(MARKS) | st.just("")) + text[at + size :]
    return text * draw(st.sampled_from((1, 1, 1, 30)))


def check_answer(reference: str, answer: str, question: str) -> None:
    begin = time.process_time()
    same = same_mathematics(reference, answer, question)
    assert isinstance(same, bool)
    assert time.process_time() - begin < 2, "the grader's own limit"
    assert isinstance(same_text(reference, answer), bool)
    if len(answer) <= 300 and same_mathematics(answer, answer):
        assert not same or same_mathematics(answer, reference) or len(reference) > 300 or not symmetric(reference)


def symmetric(reference: str) -> bool:
    """Where the reference's form does not decide: plain numbers."""
    return reference.removeprefix("-").isdecimal() and reference.isascii()


def check_response(template: Template, question: str, response: str) -> None:
    assert question in template.prompt(question)
    parsed = template.parse(response)
    assert response.startswith(parsed.thought)
    assert parsed.answer is None or parsed.answer in response
    assert template.force_answer(parsed.thought).startswith(parsed.thought.strip()[:1])
    template.forced_answer(response)
    solve(question)


def numbers(seed: int) -> tuple[str, str]:
    """Two different whole numbers, spelled in one of some ways."""
    draw = random.Random(seed)
    one = draw.randint(-(10**6), 10**6)
    other = draw.choice((-one, one + 1, one * 10, one + 10 ** draw.randint(0, 6), draw.randint(-(10**6), 10**6)))
    spell = draw.choice((str, "{:,}".format, "{}.0".format, "${}$".format, "\\boxed{{{}}}".format, "x={}".format))
    return str(one), spell(other if other != one else one + 2)


@settings(FIXED, max_examples=200)
@given(st.sampled_from(REFERENCES) | answers, answers | near(), answers)
def test_any_answer_is_graded(reference: str, answer: str, question: str) -> None:
    check_answer(reference, answer, question)


@settings(FIXED, max_examples=200)
@given(st.integers(0, 2**40))
def test_another_number_is_never_right(seed: int) -> None:
    reference, answer = numbers(seed)
    assert not same_mathematics(reference, answer), (reference, answer)
    assert normalise(reference) != normalise(answer)


@settings(FIXED, max_examples=200)
@given(st.sampled_from(TEMPLATES), answers, answers | st.text("</answer>think Answer:=\n", max_size=80))
def test_any_response_is_taken_apart(template: Template, question: str, response: str) -> None:
    check_response(template, question, response)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(FIXED, max_examples=20_000)
@given(st.sampled_from(REFERENCES) | answers, answers | near(), answers)
def test_many_answers(reference: str, answer: str, question: str) -> None:
    check_answer(reference, answer, question)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(FIXED, max_examples=20_000)
@given(st.sampled_from(TEMPLATES), answers, answers | st.text("</answer>think Answer:=\n", max_size=80))
def test_many_responses(template: Template, question: str, response: str) -> None:
    check_response(template, question, response)
