"""Answers found in responses, and not found where none was given."""

import pytest
from pydantic import ValidationError

from mai_thinking.config.tasks import TemplateSection
from mai_thinking.rl.template import Template

R1 = Template(TemplateSection())
EXERCISE = Template(TemplateSection(preset="exercise"))
TO_THE_END = Template(TemplateSection(prompt="{question}", answer_start="=", answer_end=""))


def test_prompts() -> None:
    assert EXERCISE.prompt("What is 7 + 5?") == "Question: What is 7 + 5?\n"
    prompt = R1.prompt("Is {this} 100% \\1 {question}?")
    assert "Is {this} 100% \\1 {question}?" in prompt
    assert prompt.endswith("<think>")
    assert "<answer>" in prompt


@pytest.mark.parametrize(
    ("response", "thought", "answer"),
    [
        ("hm</think><answer> 5 </answer>", "hm</think>", "5"),
        ("hm</think><answer>5</answer> and so on", "hm</think>", "5"),
        ("<answer>1</answer><answer>2</answer>", "<answer>1</answer>", "2"),
        ("<answer>1<answer>2</answer>", "<answer>1", "2"),
        ("<answer>1</answer>2</answer>", "", "1"),
        ("<answer></answer>", "", ""),
        ("<answer>5", "<answer>5", None),
        ("5</answer>", "5</answer>", None),
        ("</answer>5<answer>", "</answer>5<answer>", None),
        ("5", "5", None),
        ("", "", None),
    ],
)
def test_r1_zero(response: str, thought: str, answer: str | None) -> None:
    parsed = R1.parse(response)
    assert (parsed.thought, parsed.answer) == (thought, answer)


@pytest.mark.parametrize(
    ("response", "thought", "answer"),
    [
        ("Ones: 2.\nAnswer: 12\n", "Ones: 2.\n", "12"),
        ("Answer: 12", "", "12"),
        ("Answer: 12\nQuestion: What is 1 + 1?\n", "", "12"),
        ("Answer: 1\nAnswer: 2\nAnswer: 3\nx", "Answer: 1\nAnswer: 2\n", "3"),
        ("Answer:\n12", "", ""),
        ("Answer 12\n", "Answer 12\n", None),
        ("", "", None),
    ],
)
def test_exercise(response: str, thought: str, answer: str | None) -> None:
    parsed = EXERCISE.parse(response)
    assert (parsed.thought, parsed.answer) == (thought, answer)


def test_an_answer_to_the_end_of_the_text() -> None:
    assert TO_THE_END.parse("1 + 1 = 2\n= 3\n").answer == "3"
    assert TO_THE_END.parse("1 + 1").answer is None


def test_preset_fields_can_be_replaced_and_saved() -> None:
    section = TemplateSection(preset="exercise", answer_start="A:")  # type: ignore[call-arg]
    assert (section.prompt, section.answer_start, section.answer_end) == ("Question: {question}\n", "A:", "\n")
    assert TemplateSection(**section.model_dump()) == section


@pytest.mark.parametrize("fields", [{"prompt": "Question:"}, {"preset": "r2"}, {"answer_start": ""}])
def test_wrong_templates_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        TemplateSection(**fields)


def test_ten_thousand_tags_take_no_time() -> None:
    assert R1.parse("<answer>" * 200_000 + "</answer>" * 200_000).answer == ""
