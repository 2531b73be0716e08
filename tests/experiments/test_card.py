"""A card's minutes: what fails, hangs or has no time costs its own figures only, and all else is written at once."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.experiments.card import Part, parts_of, run_parts


def states(out: Path) -> dict[str, str]:
    return {part["name"]: part["state"] for part in json.loads((out / "summary.json").read_text())["parts"]}


def test_what_fails_or_hangs_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mai_thinking.experiments.card.GRACE", 1.0)
    seen: list[dict[str, str]] = []

    def wrong(text: str) -> Any:
        seen.append(states(tmp_path))  # what came before is written already
        raise ValueError("no figures")

    code = ["-c", "print('{\"a\": 1}')"]
    parts = [
        Part("fails", "", [["-c", "raise SystemExit(3)"], code]),
        Part("hangs", "", [["-c", "import time; time.sleep(600)"]], most=2),
        Part("unreadable", "", [code], figures=wrong),
        Part("works", "", [code, code], figures=lambda text: {"lines": len(text.splitlines())}),
        Part("late", "", [code], least=1e6),
    ]
    begin = time.monotonic()
    run_parts(parts, 5, tmp_path)
    assert time.monotonic() - begin < 60
    assert states(tmp_path) == {
        "fails": "failed: exit code 3",
        "hangs": "ended: its time was up",
        "unreadable": "done",
        "works": "done",
        "late": "left out: no time",
    }
    assert seen == [{"fails": "failed: exit code 3", "hangs": "ended: its time was up"}]
    figures = {part["name"]: part["figures"] for part in json.loads((tmp_path / "summary.json").read_text())["parts"]}
    assert figures["works"] == {"lines": 2}
    assert figures["unreadable"] == {"none": "ValueError: no figures"}
    assert "| [works](works.txt) |  | done |" in (tmp_path / "summary.md").read_text()
    run_parts([Part("fails", "", [code])], 5, tmp_path)
    assert states(tmp_path) == states(tmp_path) | {"fails": "done", "works": "done"}  # once more, and what was kept


@pytest.mark.slow
def test_all_parts_dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with tiny models: a step of L12 needs a card, all else is there."""
    monkeypatch.chdir(Path(__file__).parents[2])
    outcomes = {o["name"]: o for o in run_parts(parts_of(tmp_path / "work", tiny=True), 10, tmp_path / "out")}
    assert {name for name, outcome in outcomes.items() if outcome["state"] == "done"} >= {"base", "climb", "resume"}
    assert outcomes["base"]["figures"]["steps"] == 20
    assert outcomes["climb"]["figures"]["mismatch"] < 1e-4
    assert outcomes["resume"]["figures"]["same bits"]
