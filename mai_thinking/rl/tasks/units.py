"""Units of measurement and numbers in words, as answers have them."""

import re
from fractions import Fraction

Unit = tuple[Fraction, frozenset[tuple[str, int]]]
"""How many base units, and the base units with their powers."""

PERCENT: Unit = (Fraction(1, 100), frozenset())

_UNITS: list[tuple[str, str, dict[str, int]]] = [
    *(("m meter metre", "1", {"m": 1}), ("km kilometer kilometre", "1000", {"m": 1}), ("mm", "1/1000", {"m": 1})),
    *(("cm centimeter centimetre", "1/100", {"m": 1}), ("millimeter millimetre", "1/1000", {"m": 1})),
    *(("in inch", "127/5000", {"m": 1}), ("ft foot feet", "381/1250", {"m": 1}), ("yd yard", "1143/1250", {"m": 1})),
    *(("mi mile", "201168/125", {"m": 1}), ("mph", "1397/3125", {"m": 1, "s": -1}), ("kph", "5/18", {"m": 1, "s": -1})),
    *(("s sec second", "1", {"s": 1}), ("min minute", "60", {"s": 1}), ("h hr hour", "3600", {"s": 1})),
    *(("day", "86400", {"s": 1}), ("week", "604800", {"s": 1}), ("ms millisecond", "1/1000", {"s": 1})),
    *(("g gram gramme", "1", {"g": 1}), ("kg kilogram", "1000", {"g": 1}), ("mg milligram", "1/1000", {"g": 1})),
    *(("lb pound", "1", {"lb": 1}), ("oz ounce", "1/16", {"lb": 1})),
    *(("L l liter litre", "1/1000", {"m": 3}), ("mL ml milliliter millilitre", "1/1000000", {"m": 3})),
    *(("$ dollar USD", "1", {"$": 1}), ("¢ cent", "1/100", {"$": 1})),
    *(("€ euro EUR", "1", {"€": 1}), ("£", "1", {"£": 1})),
    *(("% percent", "1/100", {}), ("degree deg", "1", {"°": 1}), ("people person", "1", {"person": 1})),
    *(("C celsius", "1", {"C": 1}), ("F fahrenheit", "1", {"F": 1})),
    *((name, "1", {name: 1}) for name in ("N", "J", "W", "V", "A", "K", "Hz", "Pa")),
]
_KNOWN = {name: (Fraction(size), base) for names, size, base in _UNITS for name in names.split()}
MAGNITUDES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_OTHER_WORDS = (
    "or and not is to than nor mod half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths"
    " seventh eighth eighths ninth tenth tenths hundredth hundredths squared cubed plus minus times over divided"
    " factorial point negative none nan inf sin cos tan log ln exp sqrt"
)
_NO_UNITS = frozenset(_OTHER_WORDS.split())
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}


def read_unit(text: str) -> Unit | None:
    """The unit that is the whole of `text`; None if it is empty or no unit. A word not known is a unit of its own if a
    space stands before it."""
    factor, dimensions = Fraction(1), dict[str, int]()
    direction, power, unknown, known = 1, 1, 0, 0
    tokens = re.findall(r"( ?)(?:([A-Za-zµ]+|[%$€£¥¢])(?: ?\^ ?\{?(-?\d)\}?)?|([/*.]|\\cdot))", text)
    for space, word, exponent, sign in tokens:
        if sign or word == "per":
            direction = -1 if sign == "/" or word else 1
            continue
        if word in _POWERS:
            power = _POWERS[word]
            continue
        if word in MAGNITUDES:
            continue
        if word in ("degree", "degrees") and re.search(r"degrees? *(?:C|F|celsius|fahrenheit)\b", text, re.IGNORECASE):
            continue
        name = next((name for name in (word, word.casefold(), _singular(word)) if name in _KNOWN), None)
        size, base = _KNOWN[name] if name else (Fraction(1), {_singular(word): 1})
        if name is None:
            unknown += 1
            if not space or len(word) < 3 or word.casefold() in _NO_UNITS:
                return None
        known += 1
        raised = direction * power * int(exponent or 1)
        factor *= size**raised
        for dimension, degree in base.items():
            dimensions[dimension] = dimensions.get(dimension, 0) + degree * raised
        direction, power = 1, 1
    if unknown > 3 or (tokens and not known and not any(word in MAGNITUDES for _, word, _, _ in tokens)):
        return None
    return (factor, frozenset(dimensions.items())) if tokens else None


def _singular(word: str) -> str:
    word = word.casefold() if len(word) > 2 else word
    if re.search(r"(?:x|ch|sh|ss)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def spelled_number(text: str) -> Fraction | None:
    """`twenty-five` as 25, `two thirds` as 2/3; None if `text` is no number in words."""
    total, part = 0, 0
    words = re.split(r"[- ]+(?:and )?", text.casefold().removeprefix("-"))
    bottom = _PARTS.get(words[-1].removesuffix("s")) if len(words) == 2 else None
    for word in words[:-1] if bottom else words:
        if word in _SMALL:
            part += _SMALL.index(word)
        elif word in _TENS:
            part += 10 * (_TENS.index(word) + 2)
        elif word == "hundred" and part:
            part *= 100
        elif word in MAGNITUDES and part:
            total, part = total + part * MAGNITUDES[word], 0
        else:
            return None
    return Fraction(total + part, bottom or 1) * (-1 if text.startswith("-") else 1)
