"""Problems that are solved by calling a tool, made by rule: sums that are too long for the head, and a hidden map that
is asked step by step. MAI-Thinking-1 report §3.3, App. D.

A worked text shows the calls and what the tool answers, in the frame of the template `exercise`. A hidden map is a
function of its number: nothing in the question says where it leads, so that only who asks can know.
"""

import random
import re
import string
from collections.abc import Callable

NAMES = string.ascii_lowercase + string.ascii_uppercase
END = "end"
"""What a map says of a name that leads nowhere."""
CALL, RESULT = "Call: ", "Result: "

Calls = tuple[tuple[str, str], ...]
"""Each call with its result."""
Drawn = tuple[str, Calls, str]
"""Question, calls, answer."""

_SUM = re.compile(r"\d+(?: [+*-] \d+)*")
_MAP = re.compile(r"Follow ([A-Za-z]) in map (\d+) to its end\.")


def sums(rng: random.Random, size: int) -> Drawn:
    """The sum of two numbers of `size` digits → question, calls with their results, answer."""
    text = _terms(rng, size)
    total = calculate(text)
    return f"What is {text}?", ((f"calculator {text}", total),), total


def numbers(rng: random.Random, size: int) -> Drawn:
    """Two numbers of `size` digits, once more. It takes no call: it is there so that a base can write out what a call
    is to be about."""
    text = _terms(rng, size)
    return f"Repeat {text}.", (), text


def hidden_map(rng: random.Random, size: int) -> Drawn:
    """The end of a chain of `size` links of a hidden map → question, calls with their results, answer."""
    number = rng.randint(10**4, 10**5 - 1)
    path = _path(number)[-size - 1 :]
    calls = tuple((f"lookup {here}", there) for here, there in zip(path, [*path[1:], END], strict=True))
    return f"Follow {path[0]} in map {number} to its end.", calls, path[-1]


def written(calls: Calls) -> str:
    """The calls and their results, as a response has them."""
    return "".join(f"{CALL}{call}\n{RESULT}{result}\n" for call, result in calls)


def map_of(question: str) -> Callable[[str], str] | None:
    """The hidden map that a question asks about: name → the next one, or `END`; None where there is none. A name that
    the map does not have raises ValueError."""
    found = _MAP.fullmatch(question)
    if found is None:
        return None
    path = _path(int(found[2]))
    links = dict(zip(path, [*path[1:], END], strict=True))

    def lookup(name: str) -> str:
        if name not in links:
            raise ValueError(f"the map has no {name[:20]!r}; its names are single letters")
        return links[name]

    return lookup


def solve_acting(question: str) -> str | None:
    """The answer to a question of this module, worked out from its text; None for any other text."""
    if (found := re.fullmatch(r"What is (\d+ \+ \d+)\?", question)) is not None:
        return calculate(found[1])
    if (found := re.fullmatch(r"Repeat (\d+ \+ \d+)\.", question)) is not None:
        return found[1]
    if (lookup := map_of(question)) is None:
        return None
    place = question.split()[1]
    while (following := lookup(place)) != END:
        place = following
    return place


def calculate(expression: str) -> str:
    """The value of numbers with +, − and * between them, a product before a sum. ValueError for any other text, and for
    more than 200 characters."""
    text = " ".join(re.sub(r"([+*-])", r" \1 ", expression).split())
    if len(expression) > 200 or not _SUM.fullmatch(text):
        raise ValueError("write whole numbers with +, - or * between them, such as 12 + 34")
    total = 0
    for sign, term in re.findall(r"(?:^|([+-]) )(\d+(?: \* \d+)*)", text):
        product = 1
        for factor in term.split(" * "):
            product *= int(factor)
        total += -product if sign == "-" else product
    return str(total)


def _terms(rng: random.Random, size: int) -> str:
    low = 10 ** (size - 1) if size > 1 else 0
    return " + ".join(str(rng.randint(low, 10**size - 1)) for _ in range(2))


def _path(number: int) -> list[str]:
    """A map's names in the order in which they follow one another."""
    return random.Random(f"map {number}").sample(NAMES, len(NAMES))
