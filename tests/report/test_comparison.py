"""Runs side by side."""

import json
from pathlib import Path

import pytest

from mai_thinking.errors import UsageError
from mai_thinking.report.comparison import compare, parse_groups


def write_run(folder: Path, rates: list[float]) -> Path:
    folder.mkdir()
    records = [{"step": step, "loss": 1.0} for step in range(1, 5)]
    records += [{"kind": "evaluation", "step": 2 * i, "pass@1": rate} for i, rate in enumerate(rates)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_mean_and_span_of_the_last_values(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", [0.0, 0.5]), write_run(tmp_path / "b", [0.1, 0.9])
    groups = parse_groups([f"both={a},{b}", str(a)])
    table = compare(groups, ["pass@1", "loss"], tmp_path / "new" / "figure.png")
    assert "| both (2) | 0.700 (0.500–0.900) | 1.000 (1.000–1.000) |" in table
    assert "| a (1) | 0.500 | 1.000 |" in table
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_of_steps_and_evaluations_is_that_of_steps(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", []), write_run(tmp_path / "b", [])
    for run, step in ((a, 2), (b, 5)):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "evaluation", "step": step, "loss": 9.0}) + "\n")
    assert "| both (2) | 1.000 (1.000–1.000) |" in compare({"both": [a, b]}, ["loss"], tmp_path / "figure.png")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [0.0])
    with pytest.raises(UsageError, match="no metric 'pass_1'; there are loss, pass@1, step"):
        compare({"a": [run]}, ["pass_1"], tmp_path / "figure.png")
    with pytest.raises(UsageError, match="nowhere: no metrics"):
        compare({"b": [tmp_path / "nowhere"]}, ["loss"], tmp_path / "figure.png")
