"""A page of results under construction: Markdown or HTML for people, the same numbers as JSON for programs, figures."""

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console

from mai_thinking.config.storage import atomic_file
from mai_thinking.config.table import Table
from mai_thinking.errors import printable
from mai_thinking.report.figures import MISSING, Figure, draw, save


class Document:
    """Parts of a page, in the order in which they are added."""

    def __init__(self, title: str) -> None:
        self._parts: list[str | Figure] = [f"# {title}"]
        self.facts: dict[str, Any] = {"name": title}
        """The content of summary.json."""

    def add(self, *parts: str, heading: str | None = None) -> None:
        """Markdown, below a heading if there is one."""
        self._parts += [*([f"## {heading}"] if heading else []), *parts]

    def add_table(self, key: str, table: Table, heading: str | None = None) -> None:
        """A table, and its numbers as `key`."""
        self.facts[key] = table.records()
        self.add(table.markdown(), heading=heading)

    def add_figures(self, figures: Iterable[Figure]) -> None:
        """Figures, one below the other."""
        self._parts += [figure for figure in figures if figure.panels]

    def write(self, folder: Path) -> str:
        """`summary.md`, `summary.json` and the figures; returns the page."""
        folder.mkdir(parents=True, exist_ok=True)
        parts: list[str] = []
        for part in self._parts:
            if isinstance(part, str):
                parts.append(part)
            elif save(part, folder / f"{part.name}.png"):
                parts += filter(None, [f"![{part.name}]({part.name}.png)", part.caption])
        text = "\n\n".join(parts) + "\n"
        for name, content in (("summary.md", text), ("summary.json", json.dumps(plain(self.facts), indent=1) + "\n")):
            with atomic_file(folder / name) as path:
                path.write_text(content, encoding="utf-8")
        return text

    def html(self) -> str:
        """The same as HTML, figures included. Markup, links and images are no more than words; control characters are
        spelled out."""
        markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
        parts = []
        for part in self._parts:
            if isinstance(part, str):
                parts.append(markdown.render(printable(part)))
            elif (image := draw(part)) is None:
                parts.append(f"<p>{MISSING}</p>\n")
            else:
                source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
                parts.append(f'<p><img alt="{part.name}" src="{source}"></p>\n{markdown.render(part.caption)}')
        return "".join(parts)


def plain(tree: Any) -> Any:
    """`tree` as JSON has it: what is infinite or no number is null."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def fenced(text: str) -> str:
    """`text` as a Markdown code block, whatever backticks it has."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def printed(write: Callable[[Console], object]) -> str:
    """What `write` prints on a console, as a Markdown code block."""
    file = io.StringIO()
    write(Console(file=file, width=160))
    return fenced(file.getvalue().rstrip())
