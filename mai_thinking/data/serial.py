"""Problems that need serial work, made by rule: one step for each item, and each step needs the one before.

A family draws a question of a given size (its number of items), the steps of its working and the answer. The same text
is an exercise of a corpus (`SerialSection`), with or without its working, and a task of RL. Every item carries a name,
so that a step can look its item up in the question; names are letters, which are single tokens behind a space.

Who only guesses is right in at most one of ten cases, whatever the size; under the cups in one of five.

The steps of `long-sum` and `map` are calls of a tool (MAI-Thinking-1 report §3.3, App. D): sums too long for the
head, and a hidden map that is asked step by step. A hidden map is a function of its number: nothing in the question
says where it leads, so that only who asks can know.

`wording` is about the form: the items once more, behind a word of the language that is asked for, with the mark that is
asked for between them. Who does not do as asked takes any language and any mark, and may have much to say first.
"""

import itertools
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from mai_thinking.config.data import SerialSection
from mai_thinking.config.tasks import EXERCISE, SerialFamily
from mai_thinking.data.documents import Document
from mai_thinking.data.questions import Split, exercise_text, split_of

_NAMES = string.ascii_lowercase + string.ascii_uppercase
_CUPS = "12345"
_ENDS = 10
"""Chains in a question of links, each with an end of its own."""
_END = "end"
"""What a hidden map says of a name that leads nowhere."""
_MARKS = {"commas": ", ", "dashes": " - ", "slashes": " / "}
_HERE = {"English": "here", "French": "voici", "German": "hier", "Spanish": "aquí"}
_CHATTER = (
    "Well, let me think a little about what you have asked me here.",
    "Bien, je vais réfléchir un peu à ce que vous me demandez ici.",
    "Gut, ich denke erst ein wenig darüber nach, was du mich hier fragst.",
    "Bueno, voy a pensar un poco en lo que usted me pregunta aquí.",
)
"""What is said before an answer that nobody had to wait for."""


class SerialProblem(NamedTuple):
    """A question, the steps of its working in order (none for what takes none), and the answer."""

    question: str
    steps: Sequence[str]
    answer: str
    calls: Sequence[tuple[str, str]] = ()
    """The working where it is calls of a tool, each with its result."""
    otherwise: tuple[Sequence[str], str] = ((), "")
    """Of `wording`: the lines and the answer of who does not do as asked."""

    def text(self, *, worked: bool) -> str:
        """The exercise as a document, with its working or with the bare answer; of `wording` as asked or otherwise."""
        if self.otherwise[1] and not worked:
            return exercise_text(self.question, *self.otherwise)
        lines = [f"Steps: {', '.join(self.steps)}."] if self.steps else []
        for call, result in self.calls:
            lines += [f"{EXERCISE.call_start}{call}", f"{EXERCISE.result_start}{result}"]
        return exercise_text(self.question, lines if worked else (), self.answer)


def serial_problem(family: SerialFamily, size: int, rng: random.Random, split: Split) -> SerialProblem:
    """A problem of `size` items (1 to 30) whose question belongs to `split`, drawn from `rng` until there is one."""
    while True:
        problem = _DRAWS[family](rng, size)
        if split_of(problem.question) == split:
            return problem


def serial_exercises(section: SerialSection) -> Iterator[Document]:
    """Exercises 0, 1, 2, … without end; each is a function of its number and the section alone. None of their questions
    is one that RL holds out."""
    for index in itertools.count():
        rng = random.Random(f"serial {section.families} {section.sizes} {index}")
        problem = serial_problem(rng.choice(section.families), rng.randint(*section.sizes), rng, "train")
        yield Document(str(index), problem.text(worked=rng.random() < section.p_cot))


def solve(question: str) -> str | None:
    """The answer to a question of one of the families, worked out from its text; None for any other text."""
    question = question.strip()
    if found := _asked(r"Add up {}\.", r"[A-Za-z]\d", question):
        return str(sum(int(item[1:]) for item in found[-1]))
    if found := _asked(r"A dial stands at (\d)\. Turn it {}\.", r"[A-Za-z][+-]\d", question):
        return str((int(found[0]) + sum(int(item[1:]) for item in found[-1])) % 10)
    if found := _asked(r"The ball is under ([1-5])\. Swap {}\.", "[A-Za-z][1-5][1-5]", question):
        cup = found[0]
        for item in found[-1]:
            cup = _swapped(cup, item[1:])
        return cup
    if found := _asked(r"Links {}\. Follow ([A-Za-z]) to its end\.", "[A-Za-z] [A-Za-z]", question):
        links, place = dict(link.split() for link in found[-1]), found[0]
        for _ in links:
            place = links.get(place, place)
        return place
    if found := _asked(r"Repeat {}\.", r"[A-Za-z](?:\d|[+-]\d|[1-5][1-5])", question):
        return ", ".join(found[-1])
    if terms := re.fullmatch(r"(?:What is (\d+) \+ (\d+)\?)|Repeat (\d+ \+ \d+)\.", question):
        return terms[3] or str(int(terms[1]) + int(terms[2]))
    form = rf"(?:{'|'.join(_HERE)}) with (?:{'|'.join(_MARKS)})"
    if found := _asked(rf"Say {{}} in ({form})\.", r"[A-Za-z]\d", question):
        return _said(found[-1], *found[0].split(" with "))
    if (lookup := map_of(question)) is None:
        return None
    place = question.split()[1]
    while (following := lookup(place)) != _END:
        place = following
    return place


def _asked(frame: str, item: str, question: str) -> tuple[str, list[str]] | None:
    """What a question has in its frame: the one group of `frame` ("" if it has none), and the items, where `{}`
    stands."""
    found = re.fullmatch(frame.replace("{}", f"(?P<items>{item}(?:, {item})*)"), question)
    if found is None:
        return None
    others = [text for index, text in enumerate(found.groups(), 1) if index != found.re.groupindex["items"]]
    return "".join(others), found["items"].split(", ")


def _tally(rng: random.Random, size: int) -> SerialProblem:
    """The sum of named digits."""
    total, items, steps = 0, [], []
    for name in rng.sample(_NAMES, size):
        number = rng.randint(0, 9)
        total += number
        items.append(f"{name}{number}")
        steps.append(f"{items[-1]}={total}")
    return SerialProblem(f"Add up {', '.join(items)}.", steps, str(total))


def _running(rng: random.Random, size: int) -> SerialProblem:
    """A dial of ten digits that is turned on and back: the last digit of a running sum."""
    dial = rng.randint(0, 9)
    start, turns, steps = dial, [], []
    for name in rng.sample(_NAMES, size):
        by = rng.choice([n for n in range(-9, 10) if n])
        dial = (dial + by) % 10
        turns.append(f"{name}{by:+d}")
        steps.append(f"{turns[-1]}={dial}")
    return SerialProblem(f"A dial stands at {start}. Turn it {', '.join(turns)}.", steps, str(dial))


def _cups(rng: random.Random, size: int) -> SerialProblem:
    """A ball under one of five cups that are swapped two by two. Where it ends is drawn first, apart from where it
    begins: neither the first cup nor the last swap gives it away."""
    start, end = rng.choice(_CUPS), rng.choice(_CUPS)
    while True:
        cup, swaps, steps = start, [], []
        for name in rng.sample(_NAMES, size):
            pair = "".join(sorted(rng.sample(_CUPS, 2)))
            cup = _swapped(cup, pair)
            swaps.append(f"{name}{pair}")
            steps.append(f"{swaps[-1]}={cup}")
        if cup == end:
            return SerialProblem(f"The ball is under {start}. Swap {', '.join(swaps)}.", steps, end)


def _swapped(cup: str, pair: str) -> str:
    """Where a ball under `cup` is when two cups have changed places."""
    return pair[1 - pair.index(cup)] if cup in pair else cup


def _chain(rng: random.Random, size: int) -> SerialProblem:
    """Links to follow from one name to its end, among nine short chains with ends of their own."""
    others = [rng.randint(1, 2) for _ in range(_ENDS - 1)]
    room = len(_NAMES) - (size + 1) - len(others)  # every chain has one name more than links
    while sum(others) > room:
        others[others.index(2)] = 1
    names = iter(rng.sample(_NAMES, size + 1 + sum(others) + len(others)))
    chains = [[next(names) for _ in range(length + 1)] for length in (size, *others)]
    links = [f"{here} {there}" for chain in chains for here, there in pairwise(chain)]
    rng.shuffle(links)
    start, *path = chains[0]
    return SerialProblem(f"Links {', '.join(links)}. Follow {start} to its end.", path, path[-1])


def _repeat(rng: random.Random, size: int) -> SerialProblem:
    """The items of any of the other families, once more. It takes no working: it is there to be read, so that a base
    can look items up in longer questions than any whose working it has seen."""
    kind = rng.randrange(3)
    items = []
    for name in rng.sample(_NAMES, size):
        number = rng.choice([n for n in range(-9, 10) if n])
        items.append(name + (str(abs(number)), f"{number:+d}", "".join(sorted(rng.sample(_CUPS, 2))))[kind])
    return SerialProblem(f"Repeat {', '.join(items)}.", (), ", ".join(items))


def _long_sum(rng: random.Random, size: int) -> SerialProblem:
    """The sum of two numbers of `size` digits, by one call."""
    a, b = _terms(rng, size)
    return SerialProblem(f"What is {a} + {b}?", (), str(a + b), [(f"calculator {a} + {b}", str(a + b))])


def _numbers(rng: random.Random, size: int) -> SerialProblem:
    """Two numbers of `size` digits, once more. It takes no call: it is there so that a base can write out what a call
    is to be about."""
    a, b = _terms(rng, size)
    return SerialProblem(f"Repeat {a} + {b}.", (), f"{a} + {b}")


def _terms(rng: random.Random, size: int) -> tuple[int, int]:
    low, high = 10 ** (size - 1) if size > 1 else 0, 10**size - 1
    return rng.randint(low, high), rng.randint(low, high)


def _map(rng: random.Random, size: int) -> SerialProblem:
    """The end of a chain of `size` links of a hidden map, by a call for each name."""
    number = rng.randint(10**4, 10**5 - 1)
    path = _path(number)[-size - 1 :]
    calls = [(f"lookup {here}", there) for here, there in pairwise([*path, _END])]
    return SerialProblem(f"Follow {path[0]} in map {number} to its end.", (), path[-1], calls)


def _wording(rng: random.Random, size: int) -> SerialProblem:
    """Items to say in a language, and with a mark between them."""
    items = [f"{name}{rng.randint(0, 9)}" for name in rng.sample(_NAMES, size)]
    (language, mark), other = ((rng.choice(list(_HERE)), rng.choice(list(_MARKS))) for _ in range(2))
    chatter = [rng.choice(_CHATTER)] if rng.random() < 0.5 else []
    question = f"Say {', '.join(items)} in {language} with {mark}."
    return SerialProblem(question, (), _said(items, language, mark), otherwise=(chatter, _said(items, *other)))


def _said(items: Iterable[str], language: str, mark: str) -> str:
    return f"{_HERE[language]} {_MARKS[mark].join(items)}"


def map_of(question: str) -> Callable[[str], str] | None:
    """The hidden map that a question asks about: name → the next one, or `end`; None where there is none. A name that
    the map does not have raises ValueError."""
    found = re.fullmatch(r"Follow [A-Za-z] in map (\d+) to its end\.", question)
    if found is None:
        return None
    links = dict(pairwise([*_path(int(found[1])), _END]))

    def lookup(name: str) -> str:
        if name not in links:
            raise ValueError(f"the map has no {name[:20]!r}; its names are single letters")
        return links[name]

    return lookup


def _path(number: int) -> list[str]:
    """A map's names in the order in which they follow one another."""
    return random.Random(f"map {number}").sample(_NAMES, len(_NAMES))


_DRAWS: dict[SerialFamily, Callable[[random.Random, int], SerialProblem]] = {
    "tally": _tally,
    "running": _running,
    "cups": _cups,
    "chain": _chain,
    "repeat": _repeat,
    "numbers": _numbers,
    "long-sum": _long_sum,
    "map": _map,
    "wording": _wording,
}
