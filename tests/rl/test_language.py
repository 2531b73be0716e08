"""English is free, other languages count by the word, and doubt is neutral."""

import time

import pytest

from mai_thinking.data.exercises import exercise
from mai_thinking.rl.language import foreign_words

FRENCH = "Donc il faut que nous additionnions les deux nombres, et le résultat est plus grand que cinq."
GERMAN = "Wir addieren zuerst die beiden Zahlen und ziehen danach die kleinere wieder ab."
ENGLISH = "First we add the two numbers, and then we take the smaller one away again. So the result is larger."


@pytest.mark.parametrize("text", [FRENCH, GERMAN, "Primero sumamos los dos números y después restamos el más pequeño."])
def test_every_word_of_another_latin_language_counts(text: str) -> None:
    words = sum(len(word.strip(".,")) > 1 for word in text.split())
    assert foreign_words(text) == words
    assert foreign_words("\n".join(text.split())) == words, "line breaks hide nothing"


def test_mixed_text_counts_in_part() -> None:
    french = foreign_words(FRENCH)
    assert french <= foreign_words(f"{ENGLISH} {FRENCH} {ENGLISH}") < french + 8
    assert foreign_words(f"{FRENCH}\n" * 10) >= 9 * french


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("We know это просто, so go on.", 2),
        ("Ответ: я знаю", 3),
        ("我们需要计算这个", 4),
        ("답은 열둘", 2),
        ("हिन्दी में", 2),
        ("العدد الأكبر", 2),
        ("λόγος", 1),
        ("α + β = γ, Δx, 2π, ∑, 𝑥, ℝ, µ, ²", 0),
        ("x² ≤ ½ → naïve café", 0),
    ],
)
def test_scripts(text: str, count: int) -> None:
    assert foreign_words(text) == count


def test_another_script_hides_in_no_code() -> None:
    assert foreign_words("```\n# сложим числа\n```") == 2
    assert foreign_words("$слово$") == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Ja.",
        "def f(self): return self._x0 + my_name_1",
        "```python\nfor wert in liste:\n    summe += wert\n    print(summe, ende, anfang)\n```",
        "$\\frac{a}{b} \\cdot \\sin x$ and \\sqrt \\alpha \\beta \\gamma \\delta",
        "1 2 3 4 + - * / = 12",
        "<think></think><answer>12</answer>",
    ],
)
def test_code_mathematics_and_short_text_are_neutral(text: str) -> None:
    assert foreign_words(text) == 0


def test_the_exercises_are_english() -> None:
    # Names (Farah, Goran, Kofi) and bare formulas stand in them: a few doubtful words in 300 are too few to matter.
    counts = [foreign_words(exercise(index)) for index in range(300)]
    assert sum(counts) <= 15, [index for index, count in enumerate(counts) if count]


def test_time_is_linear() -> None:
    start = time.process_time()
    for text in (
        "a" * 200_000,
        "`$" * 100_000,
        "```" * 30_001,
        "ж " * 30_000,
        "<a" * 100_000,
        "\\" * 200_000,
        "'a" * 99_999,
    ):
        foreign_words(text)
    assert time.process_time() - start < 5
