"""The record table: what a trial gained, and which samples count as Python."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from record import against, compare, copied, write

from mai_thinking.training.sampling import parses


def line(name: str, tokens: int, seed: int, weighted: float, seconds: float) -> str:
    return json.dumps(
        {"name": name, "what": name, "tokens": tokens, "seed": seed, "weighted": weighted, "seconds": seconds}
        | {"bits": {"code": weighted}}
    )


def test_gains_are_of_pairs_and_a_slower_step_is_charged_for(tmp_path: Path) -> None:
    """The baseline gains 0.4 with each doubling of its tokens; the trial gains 0.5 and takes √2 of the time."""
    lines = [line("base", 100, seed, 3.0 + seed, 10.0) for seed in (0, 1)]
    lines += [line("base", 400, 0, 2.7, 40.0)]
    lines += [line("try", 100, seed, 2.5 + seed + 0.1 * seed, 10.0 * 2**0.5) for seed in (0, 1)]
    (tmp_path / "trials.jsonl").write_text("\n".join([*lines, line("unpaired", 50, 0, 1.0, 1.0)]))
    (row,) = compare(tmp_path / "trials.jsonl")
    assert (row["tried"], row["seeds"]) == ("try", 2)
    assert row["gain"] == pytest.approx(0.45)
    assert row["low"] < 0.4 < 0.5 < row["high"]
    assert row["at equal time"] == pytest.approx(0.45 - 0.5 * (3.5 - 2.7) / 2)


def test_another_model_is_given_the_minutes_that_its_own_step_takes(tmp_path: Path) -> None:
    """A step of 0.5 s, timed last, 1,200 times: ten minutes, whatever its runs took; of two cores half of it. Seeds are
    one row, lengths two, and the record that was timed beside them is there too."""
    times = [
        {"kind": "time", "name": name, "seconds": seconds, "tokens": 2048, "parameters": [3e6, 1e6], "cores": cores}
        for name, cores, seconds in (
            ("slow", 1, 9.0),
            ("slow", 1, 0.5),
            ("slow", 2, 0.25),
            ("best", 1, 1.0),
            ("record", 1, 2.0),
        )
    ]
    runs = [
        {"kind": "run", "name": name, "what": what, "tokens": 2048 * steps, "seed": seed, "seconds": 7.0}
        | {"weighted": weighted, "bits": {"code": weighted}, "cores": cores}
        for name, what, steps, seed, weighted, cores in (
            ("slow", "slow", 1200, 0, 2.0, 1),
            ("slow", "slow", 1200, 1, 3.0, 1),
            ("slow", "slow", 1200, 0, 3.5, 2),
            ("slow", "slow", 600, 0, 4.0, 1),
            ("best@2", "best, 2 times its rates", 60, 0, 1.0, 1),
        )
    ]
    path = tmp_path / "rivals.jsonl"
    path.write_text("\n".join(map(json.dumps, [*times, *runs])))
    record = {"weighted": 1.5, "bits_per_byte": {"code": 1.5}, "tokens": 2048 * 30, "seeds": [0, 1, 2]}
    rows = against(path, [{"name": "record", **record}, {"name": "not timed", **record}])
    assert [(row["model"], row["minutes"], row["seeds"], row["weighted"], row["code"]) for row in rows] == [
        ("best, 2 times its rates", 1, 1, 1, 1),
        ("record", 1, 3, 1.5, 1.5),
        ("slow", 10, 2, 2.5, 2.5),
        ("slow", 5, 1, 3.5, 3.5),
        ("slow", 5, 1, 4, 4),
    ]
    write(tmp_path, [], [], rows)
    page = (tmp_path / "summary.md").read_text()
    assert "| slow | 1 | 3.000 | 1.000 | 0.500 | 1,200 | 2.458 | 10.000 | 2 | 2.500 | 2.500 |" in page


def test_a_run_of_more_steps_is_no_record(tmp_path: Path) -> None:
    """The best is that of the fixed minutes; the longer run stands beside it, with compressors that read as much."""
    record = {"name": "short", "minutes": 20.0, "tokens": 7_000_000, "seeds": [0], "weighted": 1.5, "parsed": 0.1}
    record |= {"bits_per_byte": {"code": 1.4}, "yardsticks": {"PPMd 8": {"code": 1.2}}, "curve": {400: 1.9}}
    record |= {"commits": ["c0"], "machine": {"cores": 2}, "interval": None}
    longer = record | {"name": "long", "minutes": 60.0, "weighted": 1.25, "yardsticks": {"PPMd 8": {"code": 1.125}}}
    write(tmp_path, [record], [], longer=[longer])
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert facts["best"] == {"bits_per_byte": {"code": 1.4}, "minutes": 20.0, "seeds": [0]}
    assert [found["name"] for found in facts["longer"]] == ["long"]
    above, below = (tmp_path / "summary.md").read_text().split("## With more steps")
    assert "| long |" not in above
    assert "| long | 60.000 | 7.000 | 1 | 1.250 | 1.400 | 0.100 |" in below
    assert "| PPMd 8 |  |  |  |  | 1.125 |  |" in below


def test_finished_runs_and_first_steps_are_tables_of_their_own(tmp_path: Path) -> None:
    nats = {"nats": {"24": [9.0, 3.0]}}
    lines = [
        {"run": "a", "seed": 1, "tokens": 7, "weighted": 1.5, "bits": {"code": 1.4}} | nats,
        {"changed": ["model.offset_keys=false"], "steps": 400, "seed": 0, "loss": 5.0, "seconds": 0.5} | nats,
        {"changed": [], "steps": 400, "seed": 0, "loss": 4.0, "seconds": 0.6} | nats,
    ]
    (tmp_path / "copying.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done, begun = copied(tmp_path / "copying.jsonl")
    assert done == [{"run": "a", "seed": 1, "weighted": 1.5, "code": 1.4, "24 tokens": 9.0, "24 again": 3.0}]
    assert [row["changed"] for row in begun] == ["model.offset_keys=false", "nothing"]
    assert all((row["24 tokens"], row["24 again"]) == (9.0, 3.0) for row in begun)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("def f(x):\n    return x\n\nclass Broken((:\n", True),  # what follows the function is not looked at
        ("def f(x):\n    return x\n    y = (", True),  # nor a last line that may not be whole
        ("def f(x:\n    return x\n", False),
        ("def f(x):\nreturn x\n", False),
        ("def ", False),
    ],
)
def test_a_sample_is_its_first_function(text: str, good: bool) -> None:
    assert parses(text) is good
