"""What is held out is found where it is planted: in every script, short and long, in other punctuation and spelling.

`python tests/data/test_decontamination.py` prints the table of recall.
"""

import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from mai_thinking.config.data import CleaningSection
from mai_thinking.data.decontamination import SHORTEST, OverlapIndex, read_benchmark
from mai_thinking.data.words import words_of

N = 13
LENGTHS = (SHORTEST, 10, N, 20, 60)
"""Words of a text; characters, where a script has no spaces."""
# Letters to make words of, and what stands between words.
SCRIPTS = {
    "Latin": ("abcdefghijklmnopqrstuvwxyz", " "),
    "Latin with accents": ("aäâbcçdeéèfgiïlmnñoöøprstuüß", " "),
    "Greek": ("αβγδεζηθικλμνξοπρστυφχψωάέή", " "),
    "Cyrillic": ("абвгдежзийклмнопрстуфхцчшщыэюя", " "),
    "Arabic": ("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", " "),
    "Hebrew": ("אבגדהוזחטיכלמנסעפצקרשת", " "),
    "Devanagari": ("कखगघचजटडतदनपबमयरलवशसह", " "),
    "Korean": ("가나다라마바사아자차카타파하고노도로모보소오조초", " "),
    "Chinese": ("的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年", ""),
    "Japanese": ("あいうえおかきくけこアイウエオカキクケコ日本語文字学校年月", ""),
    "Thai": ("กขคงจฉชซญดตถทธนบปผพฟมยรลวศสหอาิีุูเแโ", ""),
    "Khmer": ("កខគឃងចឆជឈញដឋឌឍណតថទធនបផពភមយរលវសហឡអាិីុូ", ""),
    "Burmese": ("ကခဂဃငစဆဇဈညတထဒဓနပဖဗဘမယရလဝသဟအာိီုူေ", ""),
    "Lao": ("ກຂຄງຈສຊຍດຕຖທນບປຜຝພຟມຢຣລວຫອຮາິີຸູເແໂ", ""),
}
SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "other case": str.upper,
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "composed": lambda text: unicodedata.normalize("NFC", text),
    "full width": lambda text: text.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)}),
    "other punctuation": lambda text: "“" + text.replace(" ", " – ") + "”!?",
    "other spaces": lambda text: text.replace(" ", "\u00a0"),
    "broken lines": lambda text: text.replace(" ", "\r\n"),
    "invisible characters": lambda text: "\u200b".join(text[i : i + 5] for i in range(0, len(text), 5)) + "\u00ad",
}


def text_in(script: str, words: int, draw: random.Random) -> str:
    """Random words of a script; where it has no spaces, a comma now and then."""
    letters, space = SCRIPTS[script]
    if not space:
        kept = [letter for letter in letters if words_of(letter)]
        return "".join(draw.choice(kept) + ("、" if i % 9 == 8 else "") for i in range(words))
    return " ".join("".join(draw.choices(letters, k=draw.randint(3, 8))) for _ in range(words))


def index_of(n: int, texts: list[str]) -> OverlapIndex:
    index = OverlapIndex.of(CleaningSection(decontamination_ngram=n), texts)
    assert index is not None
    return index


def found_share(script: str, words: int, spell: Callable[[str], str], texts: int = 20) -> float:
    """Share of texts of which not one run of `N` words (or the whole) is left after they were planted and cleaned."""
    draw = random.Random(f"{script} {words}")
    planted = [text_in(script, words, draw) for _ in range(texts)]
    around = [text_in(script, 80, draw) for _ in range(2)]
    index = index_of(N, planted)
    found = 0
    for text in planted:
        cleaned = index.clean(f"{around[0]}\n{spell(text)}\n{around[1]}")
        found += cleaned == f"{around[0]}\n{around[1]}"
    return found / texts


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_planted_is_found_and_nothing_else_is_cut(script: str) -> None:
    for words in LENGTHS:
        for name, spell in SPELLINGS.items():
            assert found_share(script, words, spell, texts=2) == 1, f"{words} words, {name}"


@pytest.mark.parametrize("script", ["Latin", "Chinese", "Thai"])
def test_a_part_of_a_long_text_is_found_and_a_shorter_part_is_not(script: str) -> None:
    draw = random.Random(script)
    text = text_in(script, 40, draw).replace("、", "")
    units = text.split() if " " in text else list(text)
    joint = " " if " " in text else ""
    index = index_of(N, [text])
    around = text_in(script, 80, draw)
    for length, kept in ((N, False), (N - 1, True)):
        part = joint.join(units[7 : 7 + length])
        assert (index.clean(f"{around}\n{part}\n") == f"{around}\n{part}\n") == kept, length


def test_texts_of_too_few_words_are_not_looked_for() -> None:
    """Negative control: such a run stands in innocent text by chance."""
    short = " ".join("abcdefg"[: SHORTEST - 1])
    assert index_of(N, [short]).runs == {}
    assert index_of(2, ["to be"]).clean("a b c d\nto be or not\n") == "a b c d\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.jsonl", '\ufeff{"q": "one", "options": ["two", {"a": "three\u2028four"}]}\r\n\n{"q": "five"}\n'),
        ("b.json", '[{"q": "one", "options": ["two", {"a": "three\u2028four"}]}, {"q": "five"}]'),
    ],
)
def test_every_string_of_a_benchmark_counts(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    records = read_benchmark(tmp_path / name)
    assert [sorted(record) for record in records] == [["one", "three\u2028four", "two"], ["five"]]


if __name__ == "__main__":
    spellings = [(spell, name) for name, spell in SPELLINGS.items()]
    print("| script |" + "".join(f" {words} words |" for words in LENGTHS) + "\n|---|" + "---:|" * len(LENGTHS))
    for script in SCRIPTS:
        shares = [sum(found_share(script, w, spell) for spell, _ in spellings) / len(spellings) for w in LENGTHS]
        print(f"| {script} |" + "".join(f" {share:.3f} |" for share in shares))
    sys.exit()
