"""What a tool is, and what a call of it says. MAI-Thinking-1 report §3.3.

calculator 12 + 34        one argument of type str is the rest of the text
weather "Paris", 3        others are JSON, in the order of the function's parameters
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

_CALL = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)(?: (.*))?", re.DOTALL)


class ToolError(ValueError):
    """A call that could not be made. Its text is what the policy is told, as that of any ValueError of a tool is."""


@dataclass(frozen=True)
class Tool:
    """A function that a policy may call by name."""

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]
    """In the form of Hugging Face's `tools`, as chat templates take it."""
    effect: bool = False
    """Whether a call changes something outside: it is then never made twice for one rollout."""

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON schema of each parameter, in their order."""
        return dict(self.schema["function"]["parameters"].get("properties", {}))

    def arguments(self, text: str) -> list[Any]:
        """The arguments that `text` spells. ToolError if they are not what the tool takes."""
        kinds = [parameter.get("type") for parameter in self.parameters.values()]
        if kinds == ["string"]:
            return [text]
        try:
            values = json.loads(f"[{text}]")
        except (ValueError, RecursionError):
            raise ToolError(f"the arguments of {self.name} are JSON, with commas between them") from None
        required = len(self.schema["function"]["parameters"].get("required", ()))
        if not required <= len(values) <= len(kinds):
            raise ToolError(f"{self.name} takes {', '.join(self.parameters) or 'no argument'}")
        for name, kind, value in zip(self.parameters, kinds, values, strict=False):
            if kind in _TYPES and (not isinstance(value, _TYPES[kind]) or (kind != "boolean" and value is True)):
                raise ToolError(f"{self.name}: {name} is of type {kind}")
        return values


_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
}  # fmt: skip


def tool(function: Callable[..., Any], *, effect: bool = False) -> Tool:
    """A tool of one function with type hints and a docstring in Google's form (`Args:` with a line a parameter)."""
    return Tool(function.__name__, inspect.unwrap(function), get_json_schema(function), effect)


def make_call(tools: Mapping[str, Tool], text: str) -> tuple[Tool, list[Any]]:
    """The tool and the arguments of a call. ToolError if there is no such tool, or it takes other arguments."""
    found = _CALL.fullmatch(text)
    if found is None or found[1] not in tools:
        raise ToolError(f"there is no tool {text.split(' ')[0][:20]!r}; there are {', '.join(tools) or 'none'}")
    chosen = tools[found[1]]
    return chosen, chosen.arguments((found[2] or "").strip())
