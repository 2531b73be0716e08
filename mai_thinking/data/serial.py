"""Problems that need serial work, made by rule: one step for each item, and each step needs the one before.

A family draws a question of a given size (its number of items), the steps of its working and the answer. The same text
is an exercise of a corpus (`SerialSection`), with or without its working, and a task of RL. Every item carries a name,
so that a step can look its item up in the question; names are letters, which are single tokens behind a space.

Who only guesses is right in at most one of ten cases, whatever the size; under the cups in one of five.
"""

import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from mai_thinking.config.data import SerialSection
from mai_thinking.config.tasks import SerialFamily
from mai_thinking.data.acting import Drawn, hidden_map, numbers, solve_acting, sums, written
from mai_thinking.data.documents import Document
from mai_thinking.data.questions import Split, split_of

STEPS = "Steps:"
"""How the working begins, if it is shown."""
_NAMES = string.ascii_lowercase + string.ascii_uppercase
_CUPS = "12345"
_ENDS = 10
"""Chains in a question of links, each with an end of its own."""


@dataclass(frozen=True)
class SerialProblem:
    """A question, the steps of its working in order (none for what takes none), and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: str
    calls: tuple[tuple[str, str], ...] = ()
    """The working where it is calls of a tool, each with its result."""

    def text(self, *, worked: bool) -> str:
        """The exercise as a document, with its working or with the bare answer."""
        working = f"{STEPS} {', '.join(self.steps)}.\n" if self.steps else written(self.calls)
        return f"Question: {self.question}\n{working if worked else ''}Answer: {self.answer}\n"


def serial_problem(family: SerialFamily, size: int, rng: random.Random, split: Split) -> SerialProblem:
    """A problem of `size` items (1 to 30) whose question belongs to `split`, drawn from `rng` until there is one."""
    while True:
        problem = _DRAWS[family](rng, size)
        if split_of(problem.question) == split:
            return problem


def serial_exercises(section: SerialSection) -> Iterator[Document]:
    """Exercises 0, 1, 2, … without end; each is a function of its number and the section alone. None of their questions
    is one that RL holds out."""
    index = 0
    while True:
        rng = random.Random(f"serial {section.families} {section.sizes} {index}")
        problem = serial_problem(rng.choice(section.families), rng.randint(*section.sizes), rng, "train")
        yield Document(str(index), problem.text(worked=rng.random() < section.p_cot))
        index += 1


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
            pair = item[1:]
            cup = pair[1 - pair.index(cup)] if cup in pair else cup
        return cup
    if found := _asked(r"Links {}\. Follow ([A-Za-z]) to its end\.", "[A-Za-z] [A-Za-z]", question):
        links, place = dict(link.split() for link in found[-1]), found[0]
        for _ in links:
            place = links.get(place, place)
        return place
    if found := _asked(r"Repeat {}\.", r"[A-Za-z](?:\d|[+-]\d|[1-5][1-5])", question):
        return _listed(found[-1])
    return solve_acting(question)


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
    items = [(name, rng.randint(0, 9)) for name in rng.sample(_NAMES, size)]
    total, steps = 0, []
    for name, number in items:
        total += number
        steps.append(f"{name}{number}={total}")
    return SerialProblem(f"Add up {_listed(f'{name}{n}' for name, n in items)}.", tuple(steps), str(total))


def _running(rng: random.Random, size: int) -> SerialProblem:
    """A dial of ten digits that is turned on and back: the last digit of a running sum."""
    dial = rng.randint(0, 9)
    start, turns, steps = dial, [], []
    for name in rng.sample(_NAMES, size):
        by = rng.choice([n for n in range(-9, 10) if n])
        dial = (dial + by) % 10
        turns.append(f"{name}{by:+d}")
        steps.append(f"{turns[-1]}={dial}")
    return SerialProblem(f"A dial stands at {start}. Turn it {_listed(turns)}.", tuple(steps), str(dial))


def _cups(rng: random.Random, size: int) -> SerialProblem:
    """A ball under one of five cups that are swapped two by two. Where it ends is drawn first, apart from where it
    begins: neither the first cup nor the last swap gives it away."""
    start, end = rng.choice(_CUPS), rng.choice(_CUPS)
    while True:
        cup, swaps, steps = start, [], []
        for name in rng.sample(_NAMES, size):
            pair = sorted(rng.sample(_CUPS, 2))
            cup = pair[1 - pair.index(cup)] if cup in pair else cup
            swaps.append(f"{name}{''.join(pair)}")
            steps.append(f"{swaps[-1]}={cup}")
        if cup == end:
            return SerialProblem(f"The ball is under {start}. Swap {_listed(swaps)}.", tuple(steps), end)


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
    return SerialProblem(f"Links {_listed(links)}. Follow {start} to its end.", tuple(path), path[-1])


def _repeat(rng: random.Random, size: int) -> SerialProblem:
    """The items of any of the other families, once more. It takes no working: it is there to be read, so that a base
    can look items up in longer questions than any whose working it has seen."""
    kind = rng.randrange(3)
    items = []
    for name in rng.sample(_NAMES, size):
        number = rng.choice([n for n in range(-9, 10) if n])
        items.append(name + (str(abs(number)), f"{number:+d}", "".join(sorted(rng.sample(_CUPS, 2))))[kind])
    return SerialProblem(f"Repeat {_listed(items)}.", (), _listed(items))


def _acting(draw: Callable[[random.Random, int], Drawn]) -> Callable[[random.Random, int], SerialProblem]:
    """A family of `mai_thinking.data.acting` as one of these."""

    def made(rng: random.Random, size: int) -> SerialProblem:
        question, calls, answer = draw(rng, size)
        return SerialProblem(question, (), answer, calls)

    return made


def _listed(items: Iterator[str] | list[str]) -> str:
    return ", ".join(items)


_DRAWS: dict[SerialFamily, Callable[[random.Random, int], SerialProblem]] = {
    "tally": _tally,
    "running": _running,
    "cups": _cups,
    "chain": _chain,
    "repeat": _repeat,
    "numbers": _acting(numbers),
    "sums": _acting(sums),
    "map": _acting(hidden_map),
}
