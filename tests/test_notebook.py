"""docs/reading.ipynb, cell by cell, as a reader runs it."""

import json
import re
from pathlib import Path

import pytest

from mai_thinking.training.metrics import read_metrics

NOTEBOOK = Path(__file__).parents[1] / "docs" / "reading.ipynb"
CELLS = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(NOTEBOOK.read_text())["cells"]]


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(source for kind, source in CELLS if kind == "code"):
        exec(compile(source, f"cell {number}", "exec"), names)
    assert len(read_metrics(tmp_path / "rl")[0]) == 3


def test_its_links_lead_somewhere() -> None:
    links = [link for kind, text in CELLS if kind == "markdown" for link in re.findall(r"\]\(([^)#]+)\)", text)]
    assert len(links) > 10
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []
