"""Text that repeats itself, made by rule: procedural pre-training (arXiv 2601.21725).

A small model sees little human text before its minutes are over, and may never learn to look back for what followed
the same words before: the induction heads of arXiv 2209.11895. Here nothing else can be learned. Document `i` is a
function of `i` and of this Python's manuals, whose words it takes.
"""

import functools
import importlib
import itertools
import re
from collections.abc import Iterator
from random import Random

from mai_thinking.data.documents import Document

_LONGEST = 250
"""Words of what is repeated: further back than a local layer's window of 128 tokens sees."""


def repeats() -> Iterator[Document]:
    """Document 0, 1, 2, … without end."""
    for index in itertools.count():
        yield Document(str(index), repeated_text(index))


def repeated_text(index: int) -> str:
    """Words by chance, two to four times in the same order; or a few phrases, again and again in another order."""
    rng = Random(f"repeats {index}")
    words = _words()
    if rng.random() < 0.5:
        count = round(6 * (_LONGEST / 6) ** rng.random())
        lines = [rng.choices(words, k=count)] * rng.randint(2, 4)
    else:
        phrases = [rng.choices(words, k=rng.randint(2, 8)) for _ in range(rng.randint(4, 24))]
        lines = rng.choices(phrases, k=rng.randint(2, 4) * len(phrases))
    return "".join(" ".join(line) + "\n" for line in lines)


@functools.cache
def _words() -> list[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    return sorted(set(re.findall(r"[A-Za-z_]{2,}", " ".join(topics.values()))))
