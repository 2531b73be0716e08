"""The generated exercises: what they say is true, and nothing that RL holds out is among them."""

import re
from itertools import islice

from mai_thinking.data.exercises import exercises
from mai_thinking.data.questions import split_of

COUNT = 4000
EQUATION = re.compile(r"(?:[A-Z][a-z ]+:? )?(\d+(?: [-+*] \d+)+) = (-?\d+)(?=[.,])")


def split(text: str) -> tuple[str, str, list[str]]:
    """Question, answer, steps."""
    lines = text.rstrip("\n").split("\n")
    assert lines[0].startswith("Question: ")
    assert lines[-1].startswith("Answer: ")
    return lines[0].removeprefix("Question: "), lines[-1].removeprefix("Answer: "), lines[1:-1]


def test_no_question_is_held_out_for_rl() -> None:
    questions = [split(document.text)[0] for document in islice(exercises(), COUNT)]
    assert not [question for question in questions if split_of(question) == "held_out"]


def test_answers_are_right() -> None:
    """By other means than the generator's: the equations in the steps hold, and the lists are what was asked for."""
    kinds, equations = set(), 0
    for document in islice(exercises(), COUNT):
        question, answer, steps = split(document.text)
        for step in steps:
            if found := EQUATION.match(step):
                assert eval(found[1]) == int(found[2]), document.text  # digits and operators, as the pattern has it
                equations += 1
        if found := re.search(r"(first|last) of ([\d, ]+)\?", question):
            items = found[2].split(", ")
            assert answer == (items[0] if found[1] == "first" else items[-1])
        elif found := re.fullmatch(r"Write ([\d, ]+) backwards\.", question):
            assert answer.split(", ")[::-1] == found[1].split(", ")
        elif found := re.fullmatch(r"Put ([\d, ]+) in order, the smallest first\.", question):
            assert [int(item) for item in answer.split(", ")] == sorted(int(item) for item in found[1].split(", "))
        elif found := re.fullmatch(r"Number the items of ([\d, ]+)\.", question):
            assert [part.split(" is ")[1] for part in answer.split(", ")] == found[1].split(", ")
        elif found := re.fullmatch(r"(?:What is|Compute) (\d+) \+ (\d+)[.?]", question):
            assert int(answer) == int(found[1]) + int(found[2])
        kinds.add(re.sub(r"\d+", "#", question)[:12])
    assert len(kinds) > 25
    assert equations > COUNT / 4
