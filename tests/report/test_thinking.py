"""The numbers of a run that learns to think, from records with known answers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.errors import UsageError
from mai_thinking.report.thinking import write_thinking

LAST = 0.1 + 0.1 * math.log(64)


def make_run(folder: Path, rate: float = 0.1) -> Path:
    """pass@1 = rate·ln(step) + .1; the limit doubles after steps 8 and 32."""
    folder.mkdir()
    lines = []
    for step in range(65):
        level = 0.1 + rate * math.log(step) if step else 0.05
        if step:
            lines.append({"step": step, "max_length": 32 << (step > 8) + (step > 32)})
        if step & (step - 1) == 0:
            lines.append(
                {
                    "kind": "evaluation", "step": step, "pass@1": level, "pass@1_emptied": 0.01,
                    "pass@1_other_thought": 0.02, "pass@1_half_thought": 0.03, "thought_share": min(1.0, step / 8),
                    "response_length": 10 + step, "greedy": level, "pass@1_size/a/4": 0.9, "pass@1_size/b/4": 0.7,
                    "pass@1_size/a/12": level, "pass@1_size/b/14": level / 2,
                }
            )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("name: x\n")
    samples = [{"task": "a", "size": 4, "question": "q?", "answer": "7", "response": "Steps\n7", "passed": True}]
    records = [{"kind": "samples", "step": step, "samples": samples} for step in (0, 8, 64)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def seed_of(out: Path) -> dict[str, Any]:
    (seed,) = json.loads((out / "summary.json").read_text())["seeds"]
    return dict(seed)


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    beyond = [make_run(tmp_path / "from-base"), make_run(tmp_path / "from-end")]
    text = (beyond[1] / "metrics.jsonl").read_text()
    (beyond[1] / "metrics.jsonl").write_text(text.replace('"pass@1": 0.05', '"pass@1": 0.35', 1))
    write_thinking([make_run(tmp_path / "run")], tmp_path / "out", beyond)
    found = seed_of(tmp_path / "out")
    assert found["with_thought"] == pytest.approx(LAST)
    assert (found["emptied"], found["other_thought"], found["half_thought"]) == (0.01, 0.02, 0.03)
    assert (found["length_before"], found["length_after"]) == (10, 74)
    assert (found["beyond_before"], found["beyond_after"]) == (0.05, 0.35)
    assert (found["limits"], found["limits_passed"]) == ([32, 64, 128], 2)
    assert found["r_squared"] == pytest.approx(1.0)
    assert found["worst_passage"] == 0.0


def test_a_drop_behind_a_passage_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("kind") == "evaluation" and line["step"] == 16:
            line["pass@1"] = 0.2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = 0.1 + 0.1 * math.log(8)
    write_thinking([folder], tmp_path / "out")
    assert seed_of(tmp_path / "out")["worst_passage"] == pytest.approx(before - 0.2)


def test_page_and_json_have_the_same_numbers(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", rate=0.05)]
    write_thinking(runs, tmp_path / "out", [runs[0], *runs])
    seeds = json.loads((tmp_path / "out" / "summary.json").read_text())["seeds"]
    page = (tmp_path / "out" / "summary.md").read_text()
    for name in ("with_thought", "emptied", "beyond_after"):
        assert " | ".join(f"{seed[name]:.3f}" for seed in seeds) in page
    assert "after 8 steps (right)" in page
    # The worth over seeds: Student's t of one degree of freedom, 12.706205 standard errors of two values.
    worth = json.loads((tmp_path / "out" / "summary.json").read_text())["worth"]
    with_thought = [seed["with_thought"] for seed in seeds]
    assert worth["with_thought"]["effect"] == pytest.approx(sum(with_thought) / 2 - 0.01)
    reach = 12.706205 * abs(with_thought[0] - with_thought[1]) / 2
    assert worth["with_thought"]["high"] - worth["with_thought"]["effect"] == pytest.approx(reach)
    assert worth["other_thought"]["low"] == worth["other_thought"]["high"] == pytest.approx(0.01)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the output_dir of one"):
        write_thinking([tmp_path], tmp_path / "out")


def test_a_sweep_has_its_values(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, rate=rate) for name, rate in (("one", 0.1), ("two", 0.05), ("three", 0.2))]
    write_thinking(runs, tmp_path / "out", sweep=[0.0, 0.4, 0.0])
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["sweep"]
    assert [row["p_cot"] for row in rows] == [0.0, 0.4, 0.0]
    after = [row["greedy_after"] for row in rows]
    assert after[2] > after[0] > after[1]
    mean = f"{(after[0] + after[2]) / 2:.3f} ({after[0]:.3f}–{after[2]:.3f})"
    lines = (tmp_path / "out" / "summary.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith("| 0 |")).endswith(f"| {mean} |")
    assert next(line for line in lines if line.startswith("| 0.4 |")).count(f"{after[1]:.3f}") == 3


def test_beyond_wants_a_run_from_the_base_and_one_from_each_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    with pytest.raises(UsageError, match="one from the base, then one from the end of each run"):
        write_thinking([run], tmp_path / "out", [run])
