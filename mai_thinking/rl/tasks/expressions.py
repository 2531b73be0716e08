"""Formulas, in LaTeX or plain: read by a strict grammar, and compared by their values. Nothing is ever simplified.

Two formulas are the same if they have the same value wherever their letters are put at a few fixed points, negative
ones too: exactly where only rational numbers occur, else to 35 digits. Whatever the grammar does not know is refused,
so that a word is no product of its letters.
"""

import functools
import operator
import random
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mpmath import mp, mpc, mpf, workdps

Node = tuple[Any, ...]
"""A formula: its operation and what that is applied to, formulas again."""

_DIGITS, _AGREEMENT = 50, 35
_MOST_BITS = 100_000
"""Of an exact power; an inexact one may have an exponent of as many bits. No answer needs more."""
_LARGEST_FACTORIAL = 40
"""Exact with as many digits."""
_POINTS = 3

_TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d*)?\\overline\{\d+\}|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,4}(?![\w.]))?)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|[-+*/^_!|(){}\[\]])|\s+",
    re.ASCII,
)
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    **{name: getattr(mp, name) for name in ("sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh", "exp")},
    **{f"{prefix}{name}": getattr(mp, f"a{name}") for name in ("sin", "cos", "tan") for prefix in ("arc", "a")},
    # What a logarithm without a base goes to is a convention: `log` is neither `ln` nor base 10.
    **{"ln": mp.log, "lg": mp.log10, "log": lambda x: mp.log(x) / mpf("2.7013")},
}
_LETTERS = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi"
    " varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega infty ell pi"
)
_GREEK = frozenset(_LETTERS.split())
_PRODUCT = re.compile(r"(?![A-Z]{2})[abcdf-hj-np-tv-zA-DF-HJ-NP-TV-Z]{1,3}|[A-Za-z]")
"""Letters that may stand for a product: up to three, none of them a vowel but `a`. Others are a word or a name."""


class NoFormulaError(ValueError):
    """A text is no formula, or one with no value."""


def parse(text: str) -> Node:
    """The formula that is the whole of `text`. Raises NoFormulaError."""
    reader = _Reader(text)
    node = reader.sum()
    if reader.token is not None:
        raise NoFormulaError(text)
    return node


def is_numeral(node: Node) -> bool:
    """Whether a formula is a number, worked out: digits, a fraction that is no whole number, a power, or digits times
    a power of ten."""
    match node:
        case ("number", _):
            return True
        case ("-", inner):
            return is_numeral(inner)
        case ("/", ("number", top), ("number", bottom)):
            return bool(bottom) and (top / bottom).denominator > 1
        case ("/", ("-", top), bottom) | ("/", top, ("-", bottom)):
            return is_numeral(("/", top, bottom))
        case ("^", ("number", _), ("number", _) | ("-", ("number", _))):
            return True
        case ("*", ("number", _), ("^", ("number", base), ("number", _) | ("-", ("number", _)))):
            return bool(base == 10)
    return False


def letters(node: Node) -> set[str]:
    """The letters of a formula that stand for any number."""
    if node[0] == "letter":
        return {node[1]}
    return set().union(*(letters(part) for part in node if isinstance(part, tuple)))


def same_value(one: Node, other: Node) -> bool:
    """Whether two formulas have the same value everywhere."""
    with workdps(_DIGITS):
        names = letters(one) | letters(other)
        return all(_close(_value(one, point), _value(other, point)) for point in _points(names))


def proportional(one: Node, other: Node) -> bool:
    """Whether one formula is a constant times the other, which is not 0: so that one is 0 where the other is."""
    with workdps(_DIGITS):
        names = letters(one) | letters(other)
        ratios = [_apply("/", _value(one, point), _value(other, point)) for point in _points(names)]
        return ratios[0] != 0 and all(_close(ratio, ratios[0]) for ratio in ratios)


class _Reader:
    """A parser by recursive descent. `token` is the next one, (kind, text), or None at the end."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if not match:
                raise NoFormulaError(text)
            at = match.end()
            if match.lastgroup == "word":
                self._tokens += _spelled(match[0])
            elif match.lastgroup:
                token = (match.lastgroup, match[match.lastgroup])
                before = [kind for kind, _ in self._tokens[-1:]]
                # `x1`, `2 3`, `007` and `0x1F` are no products; `\log_2 8` is a function and its argument.
                if token[0] == "number" and (
                    re.match(r"0\d", token[1])
                    or (before in (["letter"], ["number"]) and self._tokens[-2:-1] != [("sign", "_")])
                ):
                    raise NoFormulaError(text)
                self._tokens.append(token)
        self._tokens.reverse()

    @property
    def token(self) -> tuple[str, str] | None:
        return self._tokens[-1] if self._tokens else None

    def _next(self) -> tuple[str, str]:
        if not self._tokens:
            raise NoFormulaError("an end too early")
        return self._tokens.pop()

    def _accept(self, *signs: str) -> str | None:
        if self._tokens and self._tokens[-1][0] in ("sign", "command") and self._tokens[-1][1] in signs:
            return self._tokens.pop()[1]
        return None

    def _until(self, bracket: str) -> Node:
        """A sum, and the bracket behind it."""
        node = self.sum()
        if not self._accept(bracket):
            raise NoFormulaError(f"no {bracket}")
        return node

    def sum(self) -> Node:
        node = self._product()
        while sign := self._accept("+", "-"):
            node = (sign, node, self._product())
        return node

    def _product(self) -> Node:
        node = self._signed()
        while True:
            if sign := self._accept("*", "cdot", "times", "/", "div"):
                node = ("/" if sign in ("/", "div") else "*", node, self._signed())
            elif self._starts():
                node = ("*", node, self._power())
            else:
                return node

    def _signed(self) -> Node:
        if sign := self._accept("+", "-"):
            if self.token in (("sign", "+"), ("sign", "-")):
                raise NoFormulaError("two signs")
            inner = self._signed()
            return ("-", inner) if sign == "-" else inner
        return self._power()

    def _starts(self) -> bool:
        """Whether what comes next may be a factor without a sign before it."""
        if self.token is None:
            return False
        kind, text = self.token
        return kind in ("letter", "function") or text in ("(", "{", "[") or (kind == "command" and text not in _INFIX)

    def _power(self) -> Node:
        node = self._atom()
        while self._accept("!"):
            node = ("!", node)
        if self._accept("^", "**"):
            return ("^", node, self._until("}") if self._accept("{") else self._signed())
        return node

    def _group(self) -> Node:
        """An argument of a command: in braces, or one digit or letter."""
        kind, text = self._next()
        if text == "{":
            return self._until("}")
        if kind == "number" and len(text) > 1 and text.isdigit():  # \frac12
            self._tokens.append(("number", text[1:]))
            return ("number", Fraction(text[0]))
        if kind not in ("number", "letter"):
            raise NoFormulaError(text)
        self._tokens.append((kind, text))
        return self._atom()

    def _atom(self) -> Node:
        kind, text = self._next()
        if kind == "number":
            return self._number(text)
        if kind == "letter" or (kind == "command" and text in _GREEK):
            return self._letter(text)
        if kind == "function" or (kind == "command" and text in _FUNCTIONS):
            return self._function(text)
        if kind == "sign" and text in _BRACKETS:
            node = self._until(_BRACKETS[text])
            return ("abs", node) if text == "|" else node
        if text in ("frac", "binom"):
            return ("/" if text == "frac" else text, self._group(), self._group())
        if text == "sqrt":
            degree: Node = self._until("]") if self._accept("[") else ("number", Fraction(2))
            return ("root", self._until(")") if self._accept("(") else self._group(), degree)
        raise NoFormulaError(text)

    def _number(self, text: str) -> Node:
        digits, _, period = text.rstrip("}").partition("\\overline{")
        value = Fraction(digits)
        if period:
            value += Fraction(int(period), 10 ** len(digits.partition(".")[2]) * (10 ** len(period) - 1))
        if text.isdigit() and self._tokens[-1:] == [("command", "frac")]:  # a mixed number, if plain digits follow
            rest = self._tokens[:]
            self._tokens.pop()
            match self._group(), self._group():
                case ("number", top), ("number", bottom) if 0 < top < bottom:
                    return ("number", value + top / bottom)
            self._tokens = rest
        return ("number", value)

    def _letter(self, name: str) -> Node:
        if self._accept("_"):
            kind, text = self._next()
            if text == "{":
                kind, text = self._next()
                if not self._accept("}"):
                    raise NoFormulaError(name)
            if kind not in ("number", "letter"):
                raise NoFormulaError(text)
            name += f"_{text}"
        return ("constant", name) if name in ("e", "i", "pi") else ("letter", name)

    def _function(self, name: str) -> Node:
        base = self._group() if name == "log" and self._accept("_") else None
        power = None
        if self._accept("^"):
            power = self._group()
            if power[0] != "number":  # \sin^{-1} has two meanings
                raise NoFormulaError(name)
        if self.token in (("sign", "("), ("sign", "{"), ("sign", "|")):
            argument = self._atom()
        else:
            argument = self._power()
            while self._starts() and self.token and self.token[0] != "function" and self.token[1] not in _FUNCTIONS:
                argument = ("*", argument, self._power())
        node: Node = ("call", name, argument)
        if base is not None:
            node = ("/", ("call", "ln", argument), ("call", "ln", base))
        return node if power is None else ("^", node, power)


_BRACKETS = {"(": ")", "[": "]", "{": "}", "|": "|"}
_INFIX = ("cdot", "times", "div")


def _spelled(word: str) -> list[tuple[str, str]]:
    """The tokens of a run of letters: a function, or a product of letters."""
    if word == "sqrt" or word in _GREEK:
        return [("command", word)]
    if word in _FUNCTIONS:
        return [("function", word)]
    if not _PRODUCT.fullmatch(word):
        raise NoFormulaError(word)
    return [("letter", letter) for letter in word]


def _points(names: set[str]) -> list[dict[str, Fraction]]:
    """A few values for each letter: fixed, fractions, some negative; one point alone where there is no letter."""
    points = []
    for index in range(_POINTS if names else 1):
        draws = {name: random.Random(f"{name} {index}") for name in names}
        signs = (1, 1) if index == 0 else (-1, -1) if index == 1 else (1, -1)
        points.append(
            {name: draw.choice(signs) * Fraction(draw.randint(500, 2500), 1009) for name, draw in draws.items()}
        )
    return points


def _value(node: Node, point: dict[str, Fraction]) -> Any:
    """A Fraction where that is exact, else one of mpmath's numbers. Raises NoFormulaError or an ArithmeticError."""
    match node:
        case ("number", value):
            return value
        case ("letter", name):
            return point[name]
        case ("constant", name):
            return {"e": mp.e, "pi": mp.pi, "i": mpc(0, 1)}[name] * mpf(1)
        case ("call", name, inner):
            return _FUNCTIONS[name](_inexact(_value(inner, point)))
    operation, *parts = node
    return _apply(operation, *(_value(part, point) for part in parts))


def _apply(operation: str, *values: Any) -> Any:
    if not all(isinstance(value, Fraction) for value in values):
        values = tuple(map(_inexact, values))
    if operation == "-":
        return operator.sub(*values) if len(values) == 2 else -values[0]
    return _OPERATIONS[operation](*values)


def _counted(function: Callable[..., Any], n: Any, *k: Any) -> Any:
    """A factorial or binomial coefficient."""
    if abs(n) > _LARGEST_FACTORIAL:
        raise NoFormulaError("too large")
    value = function(*map(_inexact, (n, *k)))
    return Fraction(int(value)) if mp.isint(value) else value


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits <= _MOST_BITS:
            return base ** int(exponent)
    base, exponent = _inexact(base), _inexact(exponent)
    if abs(exponent) * (1 + abs(mp.log(abs(base)))) > 2.0**_AGREEMENT:
        raise NoFormulaError("a power too large")
    return base**exponent


def _inexact(value: Any) -> Any:
    return mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = _inexact(a), _inexact(b)
    return bool(abs(a - b) <= mpf(10) ** -_AGREEMENT * max(abs(a), abs(b)))


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "*": operator.mul,
    "/": operator.truediv,
    "^": _power,
    "root": lambda value, degree: _power(value, 1 / degree),
    "abs": abs,
    "!": functools.partial(_counted, mp.factorial),
    "binom": functools.partial(_counted, mp.binomial),
}
