"""The class that every section of the config tree derives from, and the kinds of numbers that its fields have."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mai_thinking.config.names import RENAMED, nearest_name

Count = Annotated[int, Field(ge=1, lt=2**31)]
"""How many of something there are, of which there must be one."""
Whole = Annotated[int, Field(ge=0, lt=2**31)]
"""A count that may be 0, or a seed."""
ContextLength = Annotated[int, Field(ge=2, lt=2**31)]
"""Tokens in a row: one to read and one to predict at least."""
Seconds = Annotated[float, Field(ge=1e-3, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=1e-6, le=1e6)]
"""What something counts relative to others of its kind."""
Coefficient = Annotated[float, Field(ge=0, le=1e6)]
"""The factor of a term in a sum; 0 switches the term off."""
Temperature = Annotated[float, Field(ge=0.01, le=100)]
"""Logits are divided by it: much less than the lowest overflows, and means greedy."""


def _check_temperature(temperature: float) -> float:
    if 0 < temperature < 0.01:
        raise ValueError(f"{temperature} is too low to divide by; 0 is greedy, the next is 0.01")
    return temperature


EvaluationTemperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_check_temperature)]
"""A Temperature, or 0 for greedy."""


def _check_order(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"{list(pair)} is not [least, most]; put the lower one first")
    return pair


ORDERED = AfterValidator(_check_order)
"""Of a pair: the ends of a range, which belong to it."""
Probability = Annotated[float, Field(ge=1e-6, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""Also a file's or folder's name."""


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)]
"""A regular expression."""


UNKNOWN_KEY = "unknown_key"
"""The type of pydantic's error for a key that a section does not have."""


class Section(BaseModel):
    """A typed part of a run's configuration.

    Unknown keys and wrong types are errors; values cannot be changed after loading, so that the tree that is saved
    with a run is the tree that the run used. A field's docstring is its documentation.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, fields: Any) -> Any:
        """Pydantic's own error for an unknown key does not say which there are."""
        for key in fields if isinstance(fields, dict) else ():
            if key not in cls.model_fields:
                new = RENAMED.get(str(key))
                hint = f"it is called {new!r} now" if new else nearest_name(str(key), cls.model_fields)
                raise PydanticCustomError(UNKNOWN_KEY, "{hint}", {"key": str(key), "hint": hint})
        return fields
