"""Words of another language than English in a chain of thought: n in R_language = max(1 − α·n, 0). Report §3.1.

Scripts come first: a word in another script than the Latin one counts whatever stands around it. Latin words are judged
in stretches of some words by py3langid, and all words of a stretch count or none. Doubt is neutral: code, mathematics,
short text, and what is hardly any language at all.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff\u0e30-\u0e4e\u0eb0-\u0ecd\u102b-\u103e\u17b4-\u17d3"
"""Accents and vowel signs, which belong to a word and are no letters."""
_WORD = re.compile(rf"(?:\w|[{_MARKS}])+(?:['’][^\W\d_]+)*")
_SENTENCE = re.compile(r"[.!?;:\n]+")
_NO_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\$[^$\n]*\$|\\[A-Za-z]+|</?[A-Za-z]+>|https?://\S+", re.DOTALL)

_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}
"""Scripts without spaces between words, as the names of their characters begin."""
_CHARACTERS_PER_WORD = 2  # In those scripts, about; a convention of ours
_NEUTRAL = {
    "LATIN", "FULLWIDTH", "MATHEMATICAL", "MODIFIER", "SUPERSCRIPT", "SUBSCRIPT", "COMBINING", "FEMININE", "MASCULINE",
    "MICRO", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "KELVIN", "ANGSTROM", "OHM", "PLANCK", "EULER", "ALEF", "",
}  # fmt: skip
"""Beginnings of the names of characters that speak no other language."""

_FEWEST_WORDS, _FEWEST_LETTERS, _MOST_WORDS = 4, 16, 12
"""Of a stretch: shorter text is not told apart; in a longer one a language could hide."""
_ENGLISH = ("en", "pcm", "sco")  # Scots and Nigerian Pidgin are what py3langid makes of some plain English
_ENGLISH_AT_MOST, _OTHER_AT_LEAST = 0.02, 0.5
"""Probabilities of py3langid between which a stretch is in another language. Exercises lie far above the first."""


def foreign_words(text: str) -> int:
    """The number of words in `text` that are of another language than English. Takes time linear in the text."""
    foreign = sum(_words_by_script(word) for word in _WORD.findall(text) if not word.isascii())
    return foreign + sum(len(words) for words in _stretches(_NO_PROSE.sub(" ", text)) if _is_foreign(" ".join(words)))


def _words_by_script(word: str) -> int:
    """How many words of other scripts a run of letters holds. A single Greek letter is a symbol."""
    scripts = [_script(character) for character in word]
    unspaced = sum(script in _UNSPACED for script in scripts)
    if unspaced:
        return -(-unspaced // _CHARACTERS_PER_WORD)
    spaced = [script for script in scripts if script not in _NEUTRAL]
    return int(bool(spaced) and spaced != ["GREEK"])


@lru_cache(maxsize=65536)
def _script(character: str) -> str:
    """The first word of a character's name, which for letters is the script; "" for what is no letter."""
    if not character.isalpha():
        return ""
    return unicodedata.name(character, "").partition(" ")[0]


def _stretches(text: str) -> Iterator[list[str]]:
    """Latin words in stretches of 4 to 12 (the last: to 15): sentences, cut where long and joined where short."""
    stretch: list[str] = []
    before: list[str] | None = None
    for sentence in _SENTENCE.split(text):
        for word in _WORD.findall(sentence):
            # No names with digits or underscores, no variables of one letter, no other scripts.
            if len(word) > 1 and not any(c.isdigit() or c == "_" for c in word) and _script(word[0]) == "LATIN":
                stretch.append(word)
            if len(stretch) == _MOST_WORDS:
                yield from [before] if before else []
                before, stretch = stretch, []
        if len(stretch) >= _FEWEST_WORDS and sum(map(len, stretch)) >= _FEWEST_LETTERS:
            yield from [before] if before else []
            before, stretch = stretch, []
    if before:
        yield before + stretch


@lru_cache(maxsize=16384)
def _is_foreign(stretch: str) -> bool:
    """Whether py3langid is sure that a stretch of Latin words is not English."""
    ranked = _identifier().rank(stretch[:1000])
    english = sum(probability for language, probability in ranked if language in _ENGLISH)
    return english < _ENGLISH_AT_MOST and ranked[0][1] > _OTHER_AT_LEAST


@lru_cache(maxsize=1)
def _identifier() -> Any:
    """py3langid's model, read at first use (a second)."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
