"""The rule that keeps held-out questions out of all training: RL's problems, and the exercises of pre-training."""

from typing import Literal

import xxhash

Split = Literal["train", "held_out"]

HELD_OUT_PERCENT = 15
"""Share of all questions that is held out. A constant and no option: a question that was held out stays so."""


def question_id(question: str) -> str:
    """Hash of a question's text, but for white space: 16 hexadecimal digits. Case may be what is asked about."""
    return f"{_hash(question):016x}"


def split_of(question: str) -> Split:
    """The split goes by the question's text alone, but for case and white space: no seed, weight or option moves a
    question across."""
    return "held_out" if _hash(question.casefold()) % 100 < HELD_OUT_PERCENT else "train"


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(text.split()).encode(errors="surrogatepass"))
