"""A dirty corpus whose faults are known: copies, templated pages, boilerplate and benchmark texts, planted by rule
among clean documents, in English, code, Chinese and Arabic. The same on every call.

English and code are real (manuals and docstrings, the standard library); Chinese and Arabic are words by rule, with
Zipf's frequencies and a subject for each document. A "word" of Chinese is a character.
"""

import functools
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mai_thinking.config.data import EMBEDDED_DEFAULT
from mai_thinking.data.embedded import read_embedded

LANGUAGES = ("english", "code", "chinese", "arabic")
SIMILARITIES = (0.6, 0.7, 0.8, 0.9, 0.95)
CHANGED = (0.0, 0.05, 0.1, 0.15, 0.2)
"""Shares of a benchmark text's words that are replaced."""
SHINGLE = 5
_WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")
_WORDS = (120, 400)
"""Of a document."""


class Planted(NamedTuple):
    """A document of the dirty corpus."""

    kind: str
    """`clean`, or the fault."""
    language: str
    text: str
    lines: tuple[str, ...] = ()
    """What was put into a document that is otherwise to be kept."""

    @property
    def repeats(self) -> bool:
        """Whether the whole document is to be dropped."""
        return not self.lines and self.kind != "clean"


def dirty_corpus(language: str, seed: int = 0) -> tuple[list[Planted], list[str]]:
    """The documents, each copy behind its original, and the benchmark texts that stand in some of them."""
    writer = _Writer(language, random.Random(f"{language} {seed}"))
    documents = [
        *writer.copies(),
        *writer.templated(),
        *writer.paraphrased(),
        *writer.boilerplate(),
        *writer.benchmarks(),
        *(Planted("clean", language, text) for text in writer.rest()),
    ]
    return documents, writer.benchmark


def similarity(first: str, second: str) -> float:
    """Jaccard similarity of the sets of `SHINGLE` words."""
    a, b = ({tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
            for words in (_WORD.findall(first), _WORD.findall(second)))  # fmt: skip
    return len(a & b) / len(a | b)


class _Writer:
    """Draws clean documents, each once, and spoils them."""

    def __init__(self, language: str, draw: random.Random) -> None:
        self.language, self.draw = language, draw
        texts = list(clean_texts(language))
        draw.shuffle(texts)
        self._texts = iter(texts)
        self.words = [word for text in texts[:200] for word in _WORD.findall(text)]
        """As frequent as they are in the language."""
        self.benchmark: list[str] = []

    def rest(self) -> Iterator[str]:
        """The documents that are left."""
        return self._texts

    def next(self) -> str:
        return next(self._texts)

    def clean(self, text: str) -> Planted:
        return Planted("clean", self.language, text)

    def copies(self, each: int = 10) -> Iterator[Planted]:
        """Originals, and copies of which words here and there are replaced until the similarity is as named."""
        for wanted in SIMILARITIES:
            for _ in range(each):
                text = self.next()
                yield self.clean(text)
                yield Planted(f"near {wanted}", self.language, self._near(text, wanted))

    def _near(self, text: str, wanted: float) -> str:
        count = len(_WORD.findall(text))
        places = self.draw.sample(range(count), count)
        new = dict.fromkeys(places[: round(count * (1 - wanted) / (1 + wanted) / SHINGLE)])
        for place in itertools.chain([None], places[len(new) :]):
            new |= {} if place is None else {place: None}
            copy = self._replace(text, list(new))
            if similarity(text, copy) <= wanted + 0.01:
                return copy
        raise AssertionError(f"{count} words are too few")

    def _replace(self, text: str, places: Sequence[int]) -> str:
        """`text` with other words at these places."""
        found = list(_WORD.finditer(text))
        for place in sorted(places, reverse=True):
            start, end = found[place].span()
            text = text[:start] + self.draw.choice(self.words) + text[end:]
        return text

    def templated(self, frames: int = 3, pages: int = 12) -> Iterator[Planted]:
        """The same frame with other fillers, about a quarter of the words; every second page has its blocks in another
        order. The first is no fault."""
        for _ in range(frames):
            frame = [line for line in self.next().split("\n") if line.strip()][:12]
            slots = {}
            for number, line in enumerate(frame):
                count = len(_WORD.findall(line))
                slots[number] = self.draw.sample(range(count), round(count / 4))
            for page in range(pages):
                blocks = [self._replace(line, slots[number]) for number, line in enumerate(frame)]
                if page % 2:
                    self.draw.shuffle(blocks)
                text = "\n".join(blocks) + "\n"
                yield self.clean(text) if page == 0 else Planted("template", self.language, text)

    def paraphrased(self, each: int = 25) -> Iterator[Planted]:
        """Three tenths of the words become others, each always the same one, a fifth change places with the next, and
        the lines change their order."""
        common = {word for word, _ in _most_common(self.words)[:50]}
        for _ in range(each):
            text = self.next()
            yield self.clean(text)
            synonyms: dict[str, str] = {}
            for word in sorted(set(_WORD.findall(text)) - common):
                if self.draw.random() < 0.4:
                    synonyms[word] = self.draw.choice(self.words)
            changed = _WORD.sub(lambda found, to=synonyms: to.get(found.group(), found.group()), text)  # type: ignore
            lines = [self._swap(line) for line in changed.split("\n")]
            self.draw.shuffle(lines)
            yield Planted("paraphrase", self.language, "\n".join(lines))

    def _swap(self, line: str) -> str:
        found = list(_WORD.finditer(line))
        for a, b in reversed(list(zip(found[::2], found[1::2], strict=False))):
            if self.draw.random() < 0.2:
                line = line[: a.start()] + b.group() + line[a.end() : b.start()] + a.group() + line[b.end() :]
        return line

    def boilerplate(self, lines: int = 4, each: int = 40) -> Iterator[Planted]:
        """The same few lines in many documents (in code as comments); and one line over and over in a document."""
        notice = [self._line(12) for _ in range(lines)]
        for number in range(each):
            text = self.next().split("\n")
            at = (0, len(text), len(text) // 2)[number % 3]
            yield Planted("boilerplate across", self.language, "\n".join([*text[:at], *notice, *text[at:]]), (*notice,))
        for _ in range(15):
            line = self._line(9)
            text = self.next().split("\n")
            for _ in range(10):
                text.insert(self.draw.randint(0, len(text)), line)
            yield Planted("boilerplate within", self.language, "\n".join(text), (line,))

    def _line(self, words: int) -> str:
        joint = "" if self.language == "chinese" else " "
        line = joint.join(self.draw.sample(self.words, words))
        return f"# {line}" if self.language == "code" else line

    def benchmarks(self, each: int = 10) -> Iterator[Planted]:
        """Questions of 12 to 60 words in documents of their own: as they are, reformatted, with words replaced."""
        joint = "" if self.language == "chinese" else " "
        for changed, reformatted in [*((share, False) for share in CHANGED), (0.0, True)]:
            name = "reformatted" if reformatted else f"{100 * changed:.0f} % changed"
            for _ in range(each):
                words = _WORD.findall(self.next())
                length = self.draw.randint(12, 60)
                start = self.draw.randint(0, len(words) - length)
                question = joint.join(words[start : start + length])
                self.benchmark.append(question)
                planted = self._replace(question, self.draw.sample(range(length), int(length * changed)))
                if reformatted:
                    planted = _reformat(planted, self.language)
                text = self.next().split("\n")
                text.insert(len(text) // 2, planted)
                yield Planted(f"benchmark {name}", self.language, "\n".join(text), (planted,))


def _reformat(text: str, language: str) -> str:
    """Other case, punctuation, spaces and line ends."""
    words = _WORD.findall(text.upper())
    if language == "chinese":
        return "，".join("".join(words[i : i + 7]) for i in range(0, len(words), 7))
    return "\n".join(",  ".join(words[i : i + 6]) for i in range(0, len(words), 6))


def _most_common(words: Sequence[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda pair: -pair[1])


@functools.cache
def clean_texts(language: str) -> tuple[str, ...]:
    """Documents of 120 to 400 words that have no passage in common."""
    if language in ("chinese", "arabic"):
        return tuple(_made_up(language, random.Random(language)))
    names = {"english": ("manuals", "docstrings"), "code": ("stdlib",)}[language]
    sources = [source for source in EMBEDDED_DEFAULT if source.name in names]
    found: list[str] = []
    for source in sources:
        for document in read_embedded(source):
            # The codecs of `encodings` are one page with other fillers, and compiled modules' manuals share methods.
            if not document.id.startswith(("encodings/", "modules/")):
                found += _cut(document.text)[:2]
    return tuple(_apart(found))


def _apart(texts: Sequence[str], run: int = 12) -> Iterator[str]:
    """The texts that share no run of so many words with an earlier one."""
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        words = _WORD.findall(text.casefold())
        runs = {tuple(words[i : i + run]) for i in range(len(words) - run + 1)}
        if seen.isdisjoint(runs):
            yield text
            seen |= runs


def _cut(text: str) -> list[str]:
    """Pieces of `_WORDS` words, whole lines."""
    pieces, piece, count = [], list[str](), 0
    for line in text.split("\n"):
        piece.append(line)
        count += len(_WORD.findall(line))
        if count >= _WORDS[1] - 100:
            pieces.append(piece)
            piece, count = [], 0
    pieces += [piece] if count >= _WORDS[0] else []
    return ["\n".join(piece) + "\n" for piece in pieces]


def _made_up(language: str, draw: random.Random, documents: int = 800) -> Iterator[str]:
    if language == "chinese":
        letters, joint, stop = [chr(0x4E00 + i) for i in range(2500)], "", "。"
        lengths = (1, 2)
    else:
        letters, joint, stop = [chr(0x0627 + i) for i in range(36) if chr(0x0627 + i).isalpha()], " ", "."
        lengths = (2, 7)
    words = ["".join(draw.choices(letters, k=draw.randint(*lengths))) for _ in range(8000)]
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))
    for _ in range(documents):
        subject = draw.sample(words, 60)
        lines, size = [], 0
        goal = draw.randint(*_WORDS)
        while size < goal:
            count = draw.randint(6, 16)
            chosen = [draw.choice(subject) if draw.random() < 0.3 else draw.choices(words, cum_weights=weights)[0]
                      for _ in range(count)]  # fmt: skip
            lines.append(joint.join(chosen) + stop)
            size += count
        yield "\n".join(joint.join(lines[i : i + 2]) for i in range(0, len(lines), 2)) + "\n"
