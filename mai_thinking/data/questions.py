"""The rule that keeps held-out questions out of all training: RL's problems, and the exercises of pre-training."""

from collections.abc import Sequence
from typing import Literal

import xxhash

from mai_thinking.config.tasks import EXERCISE

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


def exercise_text(question: str, working: Sequence[str], answer: str) -> str:
    """An exercise of a corpus, in the frame that RL asks in with the template `exercise`; `working`: its lines."""
    lines = "".join(f"{line}\n" for line in working)
    return f"{EXERCISE.prompt.format(question=question)}{lines}{EXERCISE.answer_start} {answer}{EXERCISE.answer_end}"


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(" ".join(text.split()).encode(errors="surrogatepass"))
