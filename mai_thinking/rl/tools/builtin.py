"""The tools that come with the project. A further one is a function here, in `BUILTIN` and in
`config.grpo.BuiltinTool`."""

import math
import re
from collections.abc import Callable

from mai_thinking.config.grpo import ToolsSection
from mai_thinking.data.serial import map_of
from mai_thinking.rl.tasks import Problem
from mai_thinking.rl.tools.base import Tool, ToolError, tool
from mai_thinking.rl.tools.sandbox import isolation, run_python


def calculator(problem: Problem, section: ToolsSection) -> Tool:
    """Sums and products."""

    def calculator(expression: str) -> str:
        """Work out whole numbers with +, - and * between them.

        Args:
            expression: Such as 12 + 34 * 5.
        """
        return calculate(expression)

    return tool(calculator)


def lookup(problem: Problem, section: ToolsSection) -> Tool:
    """The hidden map that the problem asks about."""
    links = map_of(problem.question)

    def lookup(name: str) -> str:
        """Look a name up in the map.

        Args:
            name: A single letter.
        """
        if links is None:
            raise ToolError("there is no map here")
        return links(name)

    return tool(lookup)


def python(problem: Problem, section: ToolsSection) -> Tool:
    """A program, in a sandbox of its own."""

    def python(program: str) -> str:
        """Run a Python program and read what it prints.

        Args:
            program: Its text.
        """
        outcome = run_python(program, seconds=section.seconds, megabytes=section.megabytes, locked=not isolation())
        if outcome.failed:
            last = outcome.output.strip().rpartition("\n")[2]
            raise ToolError(f"the program {outcome.failed}{f': {last}' if last else ''}")
        return outcome.output.strip()

    return tool(python)


def calculate(expression: str) -> str:
    """The value of numbers with +, − and * between them, a product before a sum. ValueError for any other text, and for
    more than 200 characters."""
    text = " ".join(re.sub(r"([+*-])", r" \1 ", expression).split())
    if len(expression) > 200 or not re.fullmatch(r"\d+(?: [+*-] \d+)*", text):
        raise ValueError("write whole numbers with +, - or * between them, such as 12 + 34")
    total = 0
    for sign, term in re.findall(r"(?:^|([+-]) )(\d+(?: \* \d+)*)", text):
        product = math.prod(map(int, term.split(" * ")))
        total += -product if sign == "-" else product
    return str(total)


BUILTIN: dict[str, Callable[[Problem, ToolsSection], Tool]] = {
    "calculator": calculator,
    "lookup": lookup,
    "python": python,
}
"""Each makes the tool for one problem."""
