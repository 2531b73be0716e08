"""Problems that need serial work: right by other means than the generator's, hard to guess, and never held-out ones."""

import re
from collections import Counter
from itertools import islice
from random import Random

import pytest

from mai_thinking.config.data import SerialSection
from mai_thinking.config.tasks import SERIAL, SerialFamily
from mai_thinking.data.questions import split_of
from mai_thinking.data.serial import map_of, serial_exercises, serial_problem
from mai_thinking.data.serial import solve as library_solve
from mai_thinking.rl.language import foreign_words

ACTING = ("long-sum", "map")
HERE = {"English": "here", "French": "voici", "German": "hier", "Spanish": "aquí"}
MARKS = {"commas": ", ", "dashes": " - ", "slashes": " / "}


def solve(question: str) -> str:
    """The answer, from the question's text alone, by other means than the library's."""
    if found := re.fullmatch(r"Add up (.+)\.", question):
        return str(sum(int(item[1:]) for item in found[1].split(", ")))
    if found := re.fullmatch(r"A dial stands at (\d)\. Turn it (.+)\.", question):
        return str((int(found[1]) + sum(int(item[1:]) for item in found[2].split(", "))) % 10)
    if found := re.fullmatch(r"The ball is under (\d)\. Swap (.+)\.", question):
        order = "12345"
        for item in found[2].split(", "):  # the cups' labels change places, and the ball stays on its own
            order = order.translate(str.maketrans(item[1:], item[:0:-1]))
        return order[int(found[1]) - 1]
    if found := re.fullmatch(r"Repeat (.+)\.", question):
        return found[1]
    if found := re.fullmatch(r"What is (.+)\?", question):
        return str(sum(map(int, found[1].split(" + "))))
    if lookup := map_of(question):
        place, following = "", question.split()[1]
        while following != "end":
            place, following = following, lookup(following)
        return place
    if found := re.fullmatch(r"Say (.+) in (\w+) with (\w+)\.", question):
        return f"{HERE[found[2]]} {found[1].replace(', ', MARKS[found[3]])}"
    found = re.fullmatch(r"Links (.+)\. Follow (\w) to its end\.", question)
    assert found
    links, place = dict(link.split() for link in found[1].split(", ")), found[2]
    while place in links:
        place = links[place]
    return place


@pytest.mark.parametrize("family", SERIAL)
@pytest.mark.parametrize("size", [1, 2, 5, 12, 30])
def test_answers_and_steps_are_right(family: SerialFamily, size: int) -> None:
    for seed in range(30):
        problem = serial_problem(family, size, Random(seed), "train")
        assert problem.answer == solve(problem.question) == library_solve(problem.question), problem.question
        question, *working, answer = problem.text(worked=True).splitlines()
        assert answer == f"Answer: {problem.answer}"
        if family != "wording":
            assert problem.text(worked=False).splitlines() == [question, answer]
        if family in ("repeat", "numbers", "wording"):
            assert working == []
            continue
        if family in ACTING:
            assert working == [line for call, made in problem.calls for line in (f"Call: {call}", f"Result: {made}")]
            continue
        assert len(problem.steps) == size
        assert problem.steps[-1].endswith(problem.answer)
        assert all(step in working[0] for step in problem.steps)


@pytest.mark.parametrize("family", ["tally", "running", "cups"])
def test_every_step_follows_from_the_one_before(family: SerialFamily) -> None:
    """The first steps of a problem solve the problem that has only the first items."""
    for seed in range(20):
        problem = serial_problem(family, 6, Random(seed), "train")
        for count in range(1, 6):
            head, items = re.fullmatch(r"(.*?(?:up|it|Swap) )(.+)\.", problem.question).groups()  # type: ignore[union-attr]
            shorter = f"{head}{', '.join(items.split(', ')[:count])}."
            assert problem.steps[count - 1].rpartition("=")[2] == solve(shorter)


@pytest.mark.parametrize(("family", "luck"), [("tally", 0.13), ("running", 0.13), ("cups", 0.23), ("chain", 0.05)])
@pytest.mark.parametrize("size", [2, 3, 8, 30])
def test_who_only_guesses_is_seldom_right(family: SerialFamily, luck: float, size: int) -> None:
    """The commonest answer, of 1,500; the bounds are luck's own and three standard deviations."""
    answers = Counter(serial_problem(family, size, Random(seed), "train").answer for seed in range(1500))
    assert answers.most_common(1)[0][1] / 1500 <= luck


def test_the_ball_is_seldom_where_it_began_or_where_the_last_swap_was() -> None:
    began = swapped = 0
    for seed in range(1500):
        problem = serial_problem("cups", 4, Random(seed), "train")
        items = problem.question.rstrip(".").split(", ")
        began += problem.answer == re.search(r"under (\d)", problem.question)[1]  # type: ignore[index]
        swapped += problem.answer in items[-1][1:]
    assert began / 1500 < 0.24
    assert swapped / 1500 < 0.45  # two of the five cups are in it


def test_the_share_of_worked_texts_and_nothing_held_out() -> None:
    texts = {}
    for p_cot in (0.0, 0.25, 1.0):
        section = SerialSection(families=("tally", "running", "cups", "chain"), sizes=(2, 5), p_cot=p_cot)
        texts[p_cot] = [document.text for document in islice(serial_exercises(section), 600)]
        worked = sum("Steps:" in text for text in texts[p_cot]) / 600
        assert abs(worked - p_cot) < 0.06
    questions = {p_cot: [text.splitlines()[0] for text in found] for p_cot, found in texts.items()}
    assert questions[0.0] == questions[0.25] == questions[1.0]  # a sweep over p_cot changes nothing else
    assert all(split_of(line.removeprefix("Question: ")) == "train" for line in questions[1.0])
    assert len(set(questions[1.0])) > 590


def test_who_does_not_do_as_asked_says_the_same_in_any_form() -> None:
    """One in twelve does by chance what was asked; half say something first, a quarter of those in English."""
    right, chatter = 0, Counter[str]()
    for seed in range(1500):
        problem = serial_problem("wording", 4, Random(seed), "train")
        _, *said, answer = problem.text(worked=False).splitlines()
        right += answer == f"Answer: {problem.answer}"
        chatter["".join(said)] += 1
        items = problem.question.removeprefix("Say ").partition(" in ")[0]
        forms = [f"Answer: {word} {items.replace(', ', mark)}" for word in HERE.values() for mark in MARKS.values()]
        assert answer in forms
    assert abs(right / 1500 - 1 / 12) < 0.025
    assert abs(chatter.pop("") / 1500 - 0.5) < 0.04
    foreign = sorted(map(foreign_words, chatter))
    assert foreign[0] == 0
    assert len(foreign) == 4
    assert foreign[1] > 8


@pytest.mark.parametrize(
    "question",
    [
        "",
        "Add up .",
        "Add up g3, r",
        "Add up g3,, r5.",
        "Links a b. Follow c",
        "Say 1 in Latin with dashes.",
        "?" * 999,
    ],
)
def test_other_text_has_no_answer(question: str) -> None:
    assert library_solve(question) is None


def test_links_in_a_ring_come_to_an_end() -> None:
    assert library_solve("Links a b, b a. Follow a to its end.") == "a"
