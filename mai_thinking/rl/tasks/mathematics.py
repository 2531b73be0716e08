"""Whether two answers are the same mathematics: numbers, units, tuples, sets, intervals, equations, words.

An answer is taken apart first: lists and what brackets they have, names before an equals sign, units. Only what is
left is a formula. Whatever is not understood as a whole is compared as text. The reference's form decides: a list or
tuple has an order, a set and alternatives with `or` have none; a decimal is no root and no third; a number must be
worked out; a unit may be left out, but not be another one.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from mai_thinking.rl.tasks.expressions import (
    Node,
    NoFormulaError,
    is_numeral,
    letters,
    parse,
    proportional,
    same_value,
)
from mai_thinking.rl.tasks.units import MAGNITUDES, PERCENT, Unit, read_unit, spelled_number

_LONGEST = 300
"""Characters of an answer that is taken for mathematics."""


@dataclass(frozen=True)
class _Answer:
    kind: str
    """text, formula, equation, list, tuple, set, matrix, ratio or interval (ends as parts; several in a `set`)."""
    parts: tuple["_Answer", ...] = ()
    head: str = ""
    """What stands before the equals sign: x in `x = 3`."""
    text: str = ""
    """Of a text; of an interval its brackets."""
    formula: Node = ()
    """Of an equation what is 0."""
    unit: Unit | None = None


def same_mathematics(reference: str, answer: str, question: str = "") -> bool:
    """Whether `answer` is `reference`, written in whatever way. A formula of the question is no answer unless it is the
    reference letter by letter. Bounded in time by the lengths, but for powers: run it where time is limited."""
    if len(answer) > _LONGEST:
        return False
    bare = re.sub(r"\s", "", answer).strip("$.")
    if re.search(r"\w[-+*/^]|\\", bare) and bare in re.sub(r"\s", "", question):
        return bare == re.sub(r"\s", "", reference).strip("$.")
    try:
        return _same(_reference(reference), _read(answer))
    except (NoFormulaError, ArithmeticError, ValueError, TypeError, RecursionError):  # no value at some point
        return False


# ------------------------------------------------------------------------------------------------------------- reading

_WRAPPED = re.compile(
    r"\$\$?([^$]+)\$?\$|\\\((.+)\\\)|\\\[(.+)\\\]|\\boxed\{(.+)\}|\*\*(.+)\*\*|`(.+)`|\"(.+)\"|'(.+)'|“(.+)”"
)
_SPELLINGS: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"(?<=\d)(?:\\[,!;:]|\{,\}|[ \u00a0\u2009\u202f])(?=\d{3}(?!\d))": "",  # 25\,000
    r"\\(?:left|right|bigl?|bigr?|displaystyle|limits|!)(?![a-z])": "",
    r"(?<!\\)\\[,;: ]|~|\\q?quad\b": " ",
    r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|operatorname)\s*\{([^{}]*)\}": r" \1 ",
    r"\\[dtc]frac": r"\\frac",
    r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°": " degrees ",
    r"\\([%$&#])": r"\1",
    r"\\(?:[lr]?vert|[lr]Vert)\b": "|",
    r"\\leq?q?(?![a-z])|≤|<=": "≤",
    r"\\geq?q?(?![a-z])|≥|>=": "≥",
    r"\\lt\b": "<",
    r"\\gt\b": ">",
    r"\\(?:langle|lparen)\b|⟨": "(",
    r"\\(?:rangle|rparen)\b|⟩": ")",
    r"\\lbrace\b": r"\\{",
    r"\\rbrace\b": r"\\}",
    r"[−–]": "-",
    r"[×⋅·]": "*",
    r"÷": "/",
    r"√\s*(\w)": r"\\sqrt{\1}",
    r"√": r"\\sqrt",
    r"π": r"\\pi ",
    r"∞|\binfinity\b": r"\\infty ",
    r"±|\+/-": r"\\pm ",
    r"∪": r"\\cup ",
    r"∈": r"\\in ",
    r"\\varnothing|∅": r"\\emptyset",
    r"\\mathbb\s*\{?R\}?|ℝ|\ball real numbers\b": r"(-\\infty,\\infty)",
    r"[⁰¹²³⁴-⁹⁻]+": lambda found: "^{" + unicodedata.normalize("NFKC", found[0]).replace("−", "-") + "}",
    r"(\d*)([¼-¾⅐-⅞])": lambda found: (
        found[1] + "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", found[2]).split("⁄"))
    ),
    r"(?<![\d.])([1-9]\d*)(?: and | )(\d+)/(\d+)(?![\d.])": r"\1\\frac{\2}{\3}",  # 1 3/4
    r"^(?:[Tt]he )?(?:final )?[Aa]nswer(?: is|:)": "",
    r"^(?:negative|minus) ": "-",
    r"^([A-H])\)$": r"\1",
    r"(?<=\d) ?([aApP])\.?([mM])\b": r" \1\2",
    r"\s+": " ",
}
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_HEAD = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\([A-Za-z]\))?")
_MATRIX = re.compile(r"\\begin\{([pbvB]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


def _clean(text: str) -> str:
    """`text` in one spelling, without what is put around an answer."""
    text = unicodedata.normalize("NFC", text).strip()
    while True:
        bare = text.removesuffix(".").strip()
        if wrapped := _WRAPPED.fullmatch(bare):
            bare = next(part for part in wrapped.groups() if part is not None).strip()
        if bare == text:
            break
        text = bare
    for pattern, replacement in _SPELLINGS.items():
        text = re.sub(pattern, replacement, text)
    text = text.strip()
    return text if text[:1] in ("(", "[", "{", "\\") else _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)


def _read(text: str) -> _Answer:
    return _read_clean(_clean(text))


_reference = lru_cache(maxsize=1024)(_read)


def _read_clean(text: str) -> _Answer:
    text = text.strip()
    if date := _date(text):
        return _Answer("text", text=date)
    if (number := spelled_number(text)) is not None:
        return _Answer("formula", formula=("number", number))
    if "\\pm" in text or "\\mp" in text:
        pair = [text.replace("\\pm", a).replace("\\mp", b) for a, b in ("+-", "-+")]
        return _Answer("set", tuple(_read_clean(one.removeprefix("+")) for one in pair))
    for kind, separator in (("set", r"\bor\b|\\cup|\\lor\b|\\vee"), ("list", r"[,;]\s*and\b|[,;]|\band\b")):
        if len(parts := _split(text, separator)) > 1:
            read = tuple(map(_read_clean, parts))
            return _text(text) if any(part.kind == "text" for part in read) else _Answer(kind, read)
    if len(parts := _split(text, r"[<>≤≥]")) > 1:
        return _inequality(text, parts)
    if len(parts := _split(text, r"=|\\in(?![a-z])")) == 2:
        return _equation(text, *parts)
    if bracketed := _bracketed(text):
        return bracketed
    if matrix := _MATRIX.fullmatch(text):
        rows = [[_read_clean(cell) for cell in row.split("&")] for row in matrix[2].split("\\\\") if row.strip()]
        return _Answer("matrix", tuple(_Answer("tuple", tuple(row)) for row in rows))
    try:
        if len(parts := _split(text, r":|\bto\b")) > 1:
            return _Answer("ratio", tuple(_Answer("formula", formula=parse(part)) for part in parts), text=text)
        return _quantity(text)
    except NoFormulaError:
        return _text(text)


def _split(text: str, separator: str) -> list[str]:
    """`text` cut at each separator outside of brackets."""
    parts, start, depth = [], 0, 0
    for match in re.finditer(rf"(?P<open>[(\[{{])|(?P<close>[)\]}}])|{separator}", text):
        if match["open"] or match["close"]:
            depth += 1 if match["open"] else -1
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def _text(text: str) -> _Answer:
    """Words: but for case, an article and the brackets around a choice. What looks like LaTeX: but for white space."""
    text = re.sub(r"^(?:the|an?) (?=\w{2})", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\s*([,:;])\s*", r"\1", text) if "\\" not in text else re.sub(r"\s|[{}]", "", text)
    return _Answer("text", text=text.casefold() if len(text) > 1 and "\\" not in text else text)


def _date(text: str) -> str:
    """A date as year-month-day, `--month-day` without a year, or a time with `am` or `pm`; "" if `text` is none. Two
    slashes are no fraction."""
    if re.fullmatch(r"\d{4}-\d\d?-\d\d?|\d\d?/\d\d?/\d{2,4}|\d\d?\.\d\d?\.\d{4}|[\d:]+ [aApP][mM]", text):
        return text.casefold()
    words = [word for word in re.split(r"[\s,.]+", text.casefold()) if word not in ("", "of", "the")]
    months = [word for word in words if word[:3] in _MONTHS and word.isalpha()]
    numbers = [re.sub(r"(?<=\d)(?:st|nd|rd|th)$", "", word) for word in words if word[0].isdigit()]
    if len(months) != 1 or len(months) + len(numbers) != len(words) or not all(map(str.isdigit, numbers)):
        return ""
    day = [number for number in numbers if len(number) < 3]
    year = [number for number in numbers if len(number) == 4]
    if len(day) != 1 or len(day) + len(year) != len(numbers):
        return ""
    return f"{''.join(year) or '-'}-{_MONTHS.index(months[0][:3]) + 1:02}-{int(day[0]):02}"


def _inequality(text: str, parts: Sequence[str]) -> _Answer:
    """One side a letter, or a letter between two ends: an interval."""
    signs = re.findall(r"[<>≤≥]", text)
    if all(sign in ">≥" for sign in signs):
        parts, signs = parts[::-1], ["<≤"[sign == "≥"] for sign in reversed(signs)]
    if len(parts) == 2 and _HEAD.fullmatch(parts[0]):
        parts, signs = ["-\\infty", *parts], ["<", *signs]
    elif len(parts) == 2:
        parts, signs = [*parts, "\\infty"], [*signs, "<"]
    if len(parts) != 3 or not all(sign in "<≤" for sign in signs) or not _HEAD.fullmatch(parts[1]):
        return _text(text)
    brackets = "(["[signs[0] == "≤"] + ")]"[signs[1] == "≤"]
    return _Answer("interval", (_read_clean(parts[0]), _read_clean(parts[2])), parts[1], brackets)


def _equation(text: str, left: str, right: str) -> _Answer:
    if _HEAD.fullmatch(left):
        read = _read_clean(right)
        return _text(text) if read.kind == "text" or read.head else replace(read, head=left)
    try:
        return _Answer("equation", formula=("-", parse(left), parse(right)))
    except NoFormulaError:
        return _text(text)


def _bracketed(text: str) -> _Answer | None:
    """A tuple, an interval, a set or a list in square brackets."""
    if text in ("\\emptyset", "\\{\\}", "{}"):
        return _Answer("set")
    inner = text.removeprefix("\\{").removesuffix("\\}") if text.startswith("\\{") and text.endswith("\\}") else ""
    if inner and len(_split(inner, "\\}")) == 1:
        return _Answer("set", tuple(map(_read_clean, _split(inner, "[,;]"))))
    match = re.fullmatch(r"([(\[{])(.+)([)\]}])", text)
    # Brackets that close before the end are those of a product.
    if not match or any(
        sum(map(match[2][:at].count, "([{")) < sum(map(match[2][:at].count, ")]}")) for at in range(len(match[2]))
    ):
        return None
    parts, brackets = _split(match[2], "[,;]"), match[1] + match[3]
    if len(parts) == 1:
        return _read_clean(match[2]) if brackets in ("()", "[]") else None
    read = tuple(map(_read_clean, parts))
    if brackets == "{}":
        return _Answer("set", read)
    if len(parts) == 2 and brackets in ("[]", "[)", "(]"):
        return _Answer("interval", read, text=brackets)
    return _Answer("tuple", read) if brackets in ("()", "[]") else None


_QUANTITY = re.compile(
    r"(?P<sign>[-+]?) ?(?P<currency>[$€£¥]?) ?(?P<head>.*?(?:[\d)}.|!]|\\pi))"
    r"(?P<unit> ?[A-Za-zµ%$€£¥¢](?:[A-Za-zµ%$€£¥¢]|\^ ?\{?-?\d\}?|[ */.]|\\cdot )*)?",
)


def _quantity(text: str) -> _Answer:
    """A formula, with its unit. Raises NoFormulaError."""
    match = _QUANTITY.fullmatch(text)
    unit = read_unit(match["currency"] + (match["unit"] or "")) if match else None
    if not match or (unit is None and (match["currency"] or (match["unit"] or "").strip())):
        return _Answer("formula", formula=parse(text))
    node = parse(match["sign"] + match["head"])
    if letters(node):
        return _Answer("formula", formula=parse(text))
    magnitudes = [MAGNITUDES[word] for word in (match["unit"] or "").split() if word in MAGNITUDES]
    for magnitude in magnitudes:
        node = ("number", node[1] * magnitude) if node[0] == "number" else ("*", node, ("number", Fraction(magnitude)))
    if unit and not unit[1] and unit[0] == 1:
        unit = None
    return _Answer("formula", formula=node, unit=unit)


# ----------------------------------------------------------------------------------------------------------- comparing


def _same(reference: _Answer, answer: _Answer) -> bool:
    if reference.head and answer.head and _bare(reference.head) != _bare(answer.head):
        return False
    kinds = (reference.kind, answer.kind)
    if kinds == ("text", "text"):
        return reference.text == answer.text
    if kinds == ("formula", "formula"):
        return _same_quantity(reference, answer)
    if "equation" in kinds:
        return _same_equation(reference, answer)
    if kinds in (("ratio", "ratio"), ("ratio", "formula"), ("formula", "ratio")):
        return _same_ratio(reference, answer)
    if "interval" in kinds and "set" not in kinds:
        ends, others = ((one.text or "()", one.parts) for one in (reference, answer))
        return {*kinds} <= {"interval", "tuple"} and ends[0] == others[0] and _in_order(ends[1], others[1])
    if reference.kind == "set":
        parts = answer.parts if answer.kind in ("set", "list") else (answer,)
        return len(parts) == len(reference.parts) and _in_any_order(reference.parts, parts)
    if answer.kind == "set" and len(answer.parts) == 1 and reference.kind != "tuple":
        return _same(reference, answer.parts[0])
    if kinds == ("matrix", "matrix"):
        return _in_order(reference.parts, answer.parts)
    allowed = {"list": ("list", "tuple", "set"), "tuple": ("tuple", "list")}.get(reference.kind, ())
    if answer.kind not in allowed:
        return False
    named = [sorted(one.parts, key=lambda part: part.head) for one in (reference, answer)]
    if all(len({part.head for part in parts} - {""}) == len(parts) for parts in named):  # y = 2, x = 1
        return _in_order(*named)
    return _in_order(reference.parts, answer.parts)


def _bare(head: str) -> str:
    return re.sub(r"[\\{} ]", "", head)


def _in_order(ones: Sequence[_Answer], others: Sequence[_Answer]) -> bool:
    return len(ones) == len(others) and all(_same(one, other) for one, other in zip(ones, others, strict=True))


def _in_any_order(ones: Sequence[_Answer], others: Sequence[_Answer]) -> bool:
    left = list(others)
    for one in ones:
        found = next((index for index, other in enumerate(left) if _same(one, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_quantity(reference: _Answer, answer: _Answer) -> bool:
    one, other = reference.formula, answer.formula
    if is_numeral(one) and not is_numeral(other):
        return False
    mine, theirs = reference.unit, answer.unit
    if mine and theirs:
        return mine[1] == theirs[1] and same_value(_times(one, mine[0]), _times(other, theirs[0]))
    if PERCENT in (mine, theirs) and (mine is None or theirs is None):
        if same_value(_times(one, mine[0] if mine else 1), _times(other, theirs[0] if theirs else 1)):
            return True
        # `35%` and `35` answer the same question, `0.5%` and `0.5` may not.
        return one[0] == "number" and one[1] > 1 and same_value(one, other)
    return same_value(one, other)


def _times(node: Node, factor: Fraction | int) -> Node:
    return ("*", node, ("number", Fraction(factor)))


def _same_equation(reference: _Answer, answer: _Answer) -> bool:
    """Equal but for a factor. What is solved for a number in the reference must be so in the answer."""
    nodes = []
    for one in (reference, answer):
        if one.kind == "formula" and one.head and not is_numeral(one.formula):
            one = _Answer("equation", formula=("-", parse(one.head), one.formula))
        if one.kind != "equation":
            return False
        nodes.append(one.formula)
    return proportional(nodes[0], nodes[1])


def _same_ratio(reference: _Answer, answer: _Answer) -> bool:
    """2:5 is 4:10 and 2/5; 10:30, which may be a time, is itself alone."""
    if "ratio" == reference.kind == answer.kind and _in_order(reference.parts, answer.parts):
        return True
    if re.fullmatch(r"\d?\d:[0-5]\d", reference.text) or max(len(reference.parts), len(answer.parts)) > 2:
        return False
    if answer.kind == "formula" and (answer.unit or not is_numeral(answer.formula)):
        return False
    quotients = [
        ("/", *(part.formula for part in one.parts)) if one.parts else one.formula for one in (reference, answer)
    ]
    return same_value(quotients[0], quotients[1])
