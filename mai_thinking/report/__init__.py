"""A run's folder as one HTML page: `scripts/view.py`. Reads what lies on the disk; needs no torch."""

from mai_thinking.report.page import write_page

__all__ = ["write_page"]
