"""The rule that keeps held-out questions out of all training: RL's problems, and the exercises of pre-training."""

from typing import Literal

import xxhash

Split = Literal["train", "held_out"]

HELD_OUT_PERCENT = 15
"""Share of all questions that is held out. A constant and no option: a question that was held out stays so."""


def question_hash(question: str) -> int:
    """64 bits of a question's text, but for case and white space."""
    return xxhash.xxh3_64_intdigest(" ".join(question.split()).casefold().encode(errors="surrogatepass"))


def question_id(question: str) -> str:
    """The same as 16 hexadecimal digits."""
    return f"{question_hash(question):016x}"


def split_of(question: str) -> Split:
    """The split goes by the question's text alone, so no seed, weight or option moves a question across."""
    return "held_out" if question_hash(question) % 100 < HELD_OUT_PERCENT else "train"
