"""Points from any program: what may be in the file, what is refused, and the page that comes of it."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import law, points_of, times

from mai_thinking.errors import UsageError
from mai_thinking.experiments.scaling.analysis import ranked_right
from mai_thinking.experiments.scaling.points import Point, PointSet, read_points
from mai_thinking.report.ladder import write_report
from mai_thinking.training.evaluation import CATEGORY_WEIGHTS

SCRIPT = Path(__file__).parents[3] / "scripts" / "ladder.py"


def written(folder: Path, content: Any) -> Path:
    path = folder / "points.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


POINT = {"config": "a", "seed": 0, "flops": 1e12, "loss": 3.0}


def test_a_bare_list_with_one_number_each(tmp_path: Path) -> None:
    points = read_points(written(tmp_path, [POINT, POINT | {"config": "b"}]), "b")
    assert (points.configs, points.scores, points.costs) == (["b", "a"], ["loss"], ["flops"])


def test_the_report_weighs_its_own_categories_and_others_count_alike() -> None:
    point = Point(config="a", seed=0, flops=1, loss={"code": 1.0, "general": 2.0})
    own = PointSet(baseline="a", points=(point,))
    weights = CATEGORY_WEIGHTS["code"], CATEGORY_WEIGHTS["general"]
    assert own.score(point, "weighted") == pytest.approx((weights[0] + 2 * weights[1]) / sum(weights))
    foreign = Point(config="a", seed=0, flops=1, loss={"law": 1.0, "code": 2.0})
    assert PointSet(baseline="a", points=(foreign,)).score(foreign, "weighted") == pytest.approx(1.5)
    weighed = PointSet(baseline="a", points=(foreign,), weights={"law": 3, "code": 1})
    assert weighed.score(foreign, "weighted") == pytest.approx(1.25)


def test_what_is_given_twice_counts_once_and_is_told(tmp_path: Path) -> None:
    again = [POINT, POINT | {"loss": 9.0}, POINT | {"seed": 1}]
    points = read_points(written(tmp_path, [*again, POINT | {"config": "b"}]), "a")
    page = write_report(points, tmp_path / "report", "x")
    assert "Given twice, of which the first counts: a seed 0 at 1e+12 FLOPs.\n" in page
    assert "9.0000" not in page
    assert "3 runs of 2 configs" in page


def test_runs_of_nearly_equal_flops_stand_on_one_rung() -> None:
    flops = (1e12, 1.01e12, 1.3e12)
    points = PointSet(baseline="a", points=tuple(Point(config="a", seed=0, flops=f, loss={"x": 1}) for f in flops))
    assert [len(rung) for rung in points.rungs("a")] == [2, 1]


@pytest.mark.parametrize(
    ("content", "baseline", "message"),
    [
        ([POINT], None, "which config is the baseline"),
        ([POINT], "b", "no point has the config 'b'"),
        ([POINT | {"flops": 0}], "a", "flops"),
        ([POINT | {"loss": -1}], "a", r"loss.* greater than 0"),
        ([POINT | {"loss": {"weighted": 1}}], "a", "no category may be called 'weighted'"),
        ([POINT, POINT | {"loss": {"code": 1}}], "a", "give all points the same"),
        ([POINT | {"flop": 1}], "a", "did you mean 'flops'"),
        ([POINT | {"loss": {}}], "a", "loss.* at least 1 item"),
        ({"baseline": "a", "points": [POINT], "weights": {"code": 1}}, None, "weights: give each"),
        ({"baseline": "a", "points": [POINT], "weights": {"loss": 0}}, None, "weights.* greater than 0"),
        ("[", "a", "not valid JSON"),
        ("3", "a", "give a list of points"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path: Path, content: Any, baseline: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_points(written(tmp_path, content), baseline)
    assert "\n" not in str(caught.value)


def test_the_script_writes_page_figures_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = law(1.0, 0.15, 1.0)
    seconds = {"base": 1.0, "new": 1.0}
    points = points_of(
        {"base": baseline, "new": times(baseline, 1.5)}, np.random.default_rng(0), noise=0.001, seconds=seconds
    )
    path = written(tmp_path, points.model_dump())
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "fit", str(path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 0
    folder = tmp_path / "points-report"
    page = (folder / "summary.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert "**new: adopt**" in page
    for name in ("loss-flops", "loss-seconds", "gain-flops", "gain-seconds"):
        assert f"({name}.png)" in page
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    tree = json.loads((folder / "summary.json").read_text())
    assert tree["verdicts"] == {"new": "adopt"}
    fit = next(f for f in tree["fits"] if f["config"] == "base" and f["cost"] == "flops")
    assert fit["alpha"]["low"] <= 0.15 <= fit["alpha"]["high"]
    assert len(tree["points"]) == 30


TABLE = {
    "baseline": "dolma",
    "columns": {"config": "data", "flops": "compute", "seed": "seed", "rung": "params"},
    "loss": ["c4", "pile"],
    "rows": [
        {"data": data, "params": size, "seed": seed, "compute": compute * step, "c4": loss, "pile": loss + 0.1}
        for data, better in (("dolma", 0.0), ("fineweb", 0.2), ("noise", -0.3))
        for size, compute, level in (("20M", 1e12, 4.0), ("60M", 1e13, 3.5), ("150M", 1e14, 3.2))
        for seed in ("default", "small aux 2")
        for step, loss in ((1, 9.0), (2, level - better * (compute > 1e12)))
    ],
}  # fmt: skip


def test_a_table_that_another_program_wrote(tmp_path: Path) -> None:
    """As DataDecide's: a row an evaluation, seeds and sizes in words; the last evaluation of a run counts."""
    points = read_points(written(tmp_path, TABLE), None)
    assert len(points.points) == 3 * 3 * 2
    assert {point.seed for point in points.points} == {0, 1}
    assert [rung[0].rung for rung in points.rungs("dolma")] == [0, 1, 2]
    assert points.scores == ["c4", "pile", "weighted"]
    assert max(point.loss["c4"] for point in points.points) == 4.0
    # All alike at the smallest rung, so no pair stands there as at the largest; at the middle one all do.
    assert ranked_right(points)["c4"] == [0.0, 1.0]
    assert "| 2e+13 | 100%, best fineweb |" in write_report(points, tmp_path / "report", "x")


def test_a_table_without_a_column_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows.0 has no column 'flops'; it has data, params"):
        read_points(written(tmp_path, TABLE | {"columns": TABLE["columns"] | {"flops": "flops"}}), None)  # type: ignore[operator]
