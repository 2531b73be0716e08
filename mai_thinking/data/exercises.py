"""Arithmetic and algebra exercises with worked steps, made by rule: the embedded source of maths.

Exercise `i` is a function of `i` alone. Two exercises may come out alike; deduplication removes the second, and the
held-out split goes by text, so that no held-out exercise is trained on. Nor is any question that RL holds out: such a
question is drawn again.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from random import Random

from mai_thinking.data.documents import Document
from mai_thinking.data.questions import exercise_text, split_of


def exercises() -> Iterator[Document]:
    """Exercise 0, 1, 2, … without end."""
    for index in itertools.count():
        yield Document(str(index), exercise(index))


def exercise(index: int) -> str:
    """A question, its worked steps and `Answer: …`, a line each."""
    rng = Random(f"exercise {index}")
    kind = _KINDS[rng.randrange(len(_KINDS))]
    question, steps, answer = kind(rng)
    while split_of(question) == "held_out":
        question, steps, answer = kind(rng)
    return exercise_text(question, steps, answer)


def exercise_kind(index: int) -> str:
    """What exercise `index` practises: `addition`, `fractions`, …"""
    return _KINDS[Random(f"exercise {index}").randrange(len(_KINDS))].__name__.lstrip("_")


_Exercise = tuple[str, list[str], str]
"""Question, worked steps, answer."""


def _number(rng: Random, digits: int = 4) -> int:
    """A number of 1 to `digits` digits, each length as likely as the others."""
    length = rng.randint(1, digits)
    return rng.randint(10 ** (length - 1) if length > 1 else 0, 10**length - 1)


def _addition(rng: Random) -> _Exercise:
    a, b = _number(rng, 5), _number(rng, 5)
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        rest = f", write {total % 10}, carry {total // 10}" if total > 9 else f", write {total}"
        steps.append(f"{_PLACES[place]}: {x} + {y}{carried} = {total}{rest}.")
        carry = total // 10
    return rng.choice([f"What is {a} + {b}?", f"Add {a} and {b}.", f"Compute {a} + {b}."]), steps, str(a + b)


_PLACES = ("Ones", "Tens", "Hundreds", "Thousands", "Ten thousands", "Hundred thousands")


def _subtraction(rng: Random) -> _Exercise:
    a, b = _number(rng), _number(rng)
    question = rng.choice([f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"Compute {a} - {b}."])
    if a < b:
        return question, [f"{b} is larger than {a}, so the result is negative.", f"{b} - {a} = {b - a}."], str(a - b)
    return question, [f"Check: {b} + {a - b} = {a}."], str(a - b)


def _multiplication(rng: Random) -> _Exercise:
    a, b = _number(rng, 3), _number(rng, 2)
    tens, ones = b // 10 * 10, b % 10
    steps = [f"{a} * {b} = {a} * {tens} + {a} * {ones} = {a * tens} + {a * ones}."] if tens and ones else []
    return rng.choice([f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"Compute {a} times {b}."]), steps, str(a * b)


def _division(rng: Random) -> _Exercise:
    a, b = _number(rng), rng.randint(2, 25)
    q, r = divmod(a, b)
    steps = [f"{b} * {q} = {b * q}.", f"{a} - {b * q} = {r}, which is less than {b}."]
    return f"Divide {a} by {b}. Give quotient and remainder.", steps, f"{q} remainder {r}"


def _linear(rng: Random) -> _Exercise:
    a, x, b = rng.randint(2, 12), rng.randint(-20, 20), rng.randint(-30, 30)
    v, c = rng.choice("xyzntk"), a * x + b
    left = f"{a}{v}" + (f" + {b}" if b > 0 else f" - {-b}" if b else "")
    steps = []
    if b:
        verb = f"Subtract {b} from" if b > 0 else f"Add {-b} to"
        steps.append(f"{verb} both sides: {a}{v} = {c - b}.")
    steps.append(f"Divide both sides by {a}: {v} = {x}.")
    return f"Solve {left} = {c} for {v}.", steps, f"{v} = {x}"


def _precedence(rng: Random) -> _Exercise:
    a, b, c = (rng.randint(1, 20) for _ in range(3))
    if rng.random() < 0.5:
        steps = [f"First {b} * {c} = {b * c}.", f"Then {a} + {b * c} = {a + b * c}."]
        return f"Evaluate {a} + {b} * {c}.", steps, str(a + b * c)
    steps = [f"First {a} + {b} = {a + b}.", f"Then {a + b} * {c} = {(a + b) * c}."]
    return f"Evaluate ({a} + {b}) * {c}.", steps, str((a + b) * c)


def _greatest_divisor(rng: Random) -> _Exercise:
    common = rng.randint(1, 12)
    a, b = common * rng.randint(2, 40), common * rng.randint(2, 40)
    steps, x, y = [], max(a, b), min(a, b)
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}.")
        x, y = y, x % y
    return f"Find the greatest common divisor of {a} and {b}.", steps, str(x)


def _fractions(rng: Random) -> _Exercise:
    b, d = rng.randint(2, 12), rng.randint(2, 12)
    a, c = rng.randint(1, b), rng.randint(1, d)
    bottom = math.lcm(b, d)
    x, y = a * bottom // b, c * bottom // d
    common = math.gcd(x + y, bottom)
    steps = [f"The common denominator is {bottom}.", f"{x}/{bottom} + {y}/{bottom} = {x + y}/{bottom}."]
    top, bottom = (x + y) // common, bottom // common
    if common > 1:
        steps.append(f"Divide both by {common}: {top}/{bottom}.")
    return f"What is {a}/{b} + {c}/{d}?", steps, f"{top}/{bottom}" if bottom > 1 else str(top)


def _percentage(rng: Random) -> _Exercise:
    percent, amount = rng.choice([5, 10, 20, 25, 30, 40, 50, 60, 75, 80, 90]), 20 * rng.randint(1, 50)
    steps = [f"{percent}% of {amount} is {amount} * {percent} / 100 = {amount * percent} / 100."]
    return f"What is {percent}% of {amount}?", steps, str(amount * percent // 100)


def _sequence(rng: Random) -> _Exercise:
    start, step = rng.randint(-10, 40), rng.choice([-7, -5, -4, -3, -2, 2, 3, 4, 5, 6, 7, 8, 9, 11])
    shown = [start + step * i for i in range(rng.randint(4, 6))]
    listed = ", ".join(map(str, shown))
    return f"What comes next: {listed}?", [f"Each number is the one before plus {step}."], str(shown[-1] + step)


def _shopping(rng: Random) -> _Exercise:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    count, price = rng.randint(2, 12), rng.randint(2, 15)
    total = count * price
    paid = total + rng.randint(1, 30)
    question = (
        f"{name} buys {count} {thing} at {price} coins each and pays with {paid} coins. How many coins come back?"
    )
    return question, [f"{count} * {price} = {total}.", f"{paid} - {total} = {paid - total}."], str(paid - total)


_NAMES = ("Ada", "Bela", "Chidi", "Dana", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
_THINGS = ("apples", "pencils", "tickets", "stamps", "candles", "books", "oranges", "nails", "cups", "maps")


def _comparison(rng: Random) -> _Exercise:
    a, b = _number(rng, 5), _number(rng, 5)
    sign = "<" if a < b else ">" if a > b else "="
    steps = [] if len(str(a)) == len(str(b)) else [f"{a} has {len(str(a))} digits and {b} has {len(str(b))}."]
    return f"Which sign belongs between {a} and {b}: <, > or =?", steps, f"{a} {sign} {b}"


def _ends(rng: Random) -> _Exercise:
    numbers = _list(rng)
    which, answer = rng.choice([("first", numbers[0]), ("last", numbers[-1])])
    return f"What is the {which} of {_listed(numbers)}?", [], str(answer)


def _backwards(rng: Random) -> _Exercise:
    numbers = _list(rng)
    return f"Write {_listed(numbers)} backwards.", [], _listed(numbers[::-1])


def _ascending(rng: Random) -> _Exercise:
    numbers = _list(rng)
    question = f"Put {_listed(numbers)} in order, the smallest first."
    return question, [f"The smallest is {min(numbers)}."], _listed(sorted(numbers))


def _enumeration(rng: Random) -> _Exercise:
    numbers = _list(rng)
    numbered = ", ".join(f"{place} is {number}" for place, number in enumerate(numbers, start=1))
    return f"Number the items of {_listed(numbers)}.", [], numbered


def _list(rng: Random) -> list[int]:
    return [_number(rng, 2) for _ in range(rng.randint(2, 6))]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


_KINDS: tuple[Callable[[Random], _Exercise], ...] = (
    _addition, _subtraction, _multiplication, _division, _linear, _precedence, _greatest_divisor, _fractions,
    _percentage, _sequence, _shopping, _comparison, _ends, _backwards, _ascending, _enumeration,
)  # fmt: skip
