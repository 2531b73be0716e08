"""Figures and pages, read from run folders alone: `summary.md` with `summary.json`, and one HTML page."""

from pathlib import Path

from mai_thinking.config.command import EXIT_COLLAPSED
from mai_thinking.report.page import write_page
from mai_thinking.report.summary import write_summary

__all__ = ["conclude", "write_page", "write_summary"]


def conclude(code: int, folder: Path) -> int:
    """The exit code of a recipe, after the page of its run: of one that came to its end, or has collapsed."""
    if code in (0, EXIT_COLLAPSED):
        write_summary(folder)
    return code
