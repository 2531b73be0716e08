"""Suggestions for names that are mistyped or of an earlier version."""

import difflib
from collections.abc import Iterable
from pathlib import Path

RENAMED = {"cut_off_share": "long_share", "survivor_seconds": "jit_seconds"}
"""The last part of a config key of before → what it is called now."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest of `known`, or the list of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def nearest_path(path: Path, others: Iterable[Path]) -> str:
    """The end of a message on a file that is not there: `; did you mean x?`, or nothing."""
    near = difflib.get_close_matches(str(path), map(str, others), n=1)
    return f"; did you mean {near[0]}?" if near else ""
