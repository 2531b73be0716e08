"""Studies: arms and seeds as stages of one climb, what fits, a tiny one run twice, the table of made-up records."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.config.study import StudyConfig
from mai_thinking.errors import RunError, UsageError
from mai_thinking.experiments.climb import RECIPES, run_climb
from mai_thinking.experiments.plan import ClimbPlan
from mai_thinking.recipes.grpo import grpo
from mai_thinking.report.study import claims, measure, table, verdict_of, write_report
from mai_thinking.rl.collapse import Collapse, CollapseDetector
from mai_thinking.training.metrics import read_records

CONFIGS = Path(__file__).parents[2] / "configs"
Make = Callable[..., StudyConfig]


@pytest.fixture(scope="module")
def make(tiny_run: Path) -> Make:
    def config(folder: Path, *overrides: str) -> StudyConfig:
        base = [f'{place}.set={{init_from: "{tiny_run}/final", steps: 2}}' for place in ("shared.0", "stages.0")]
        return load_config(StudyConfig, CONFIGS / "tiny-findings.yaml", [f"output_dir={folder}", *base, *overrides])

    return config


def test_every_arm_is_run_with_every_seed(make: Make, tmp_path: Path) -> None:
    plan = ClimbPlan(make(tmp_path / "x").as_climb())
    assert [stage.name for stage in plan.stages] == [
        name
        for seed in (0, 1)
        for name in (
            f"teacher-{seed}",
            *(f"{arm}-{stage}-{seed}" for arm in ("late", "no-dropout") for stage in ("distill", "climb")),
        )
    ]
    configs = {stage.name: stage.config for stage in plan.stages}
    late, without = configs["late-distill-1"], configs["no-dropout-distill-1"]
    assert isinstance(late, DistillConfig)
    assert isinstance(without, DistillConfig)
    # An arm changes what it names and nothing else; the seed is the study's, the same in all arms.
    assert (late.dropout, without.dropout) == (0.15, 0.0)
    assert (late.traces[0].late, without.traces[0].late) == (0.5, None)
    assert late.traces[0].run == without.traces[0].run == str(tmp_path / "x" / "teacher-1")
    assert {config.seed for name, config in configs.items() if name.endswith("-1")} == {1}
    assert configs["late-climb-1"].init_from == str(tmp_path / "x" / "late-distill-1" / "final")
    assert configs["late-climb-1"].steps == configs["no-dropout-climb-1"].steps == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("measured=climbs", "did you mean 'climb'"),
        ("measured=distill", "'distill' does not climb"),
        ("arms.1.stage=distil", "did you mean 'distill'"),
        ("arms.1.stage=null", "arm 'no-dropout': `stage` says where"),
        ("arms.1.name=late", "arms: one is there twice"),
        ("seeds=[1, 1]", "seeds: one is there twice"),
        ("arms.1.set={dropuot: 0}", "unknown key 'dropuot'; did you mean 'dropout'"),
        ("arms.0.traces={later: 0.5}", "arm 'late': unknown key .*later"),
        ("stages.0.traces.0.stage=teachers", "no earlier stage"),
    ],
)
def test_what_does_not_fit_is_refused(make: Make, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        ClimbPlan(make(tmp_path / "x", override).as_climb())
    assert "\n" not in str(caught.value)


@pytest.fixture
def collapsing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`collapsing(stage)`: that stage collapses at its first step."""

    def collapse(stage: str) -> None:
        def climb_of(config: GrpoConfig) -> int:
            with monkeypatch.context() as patch:
                if config.name == stage:
                    patch.setattr(CollapseDetector, "update", give_up)
                return grpo(config)

        monkeypatch.setitem(RECIPES, "grpo", climb_of)

    def give_up(self: CollapseDetector, record: dict[str, Any]) -> Collapse:
        sign = {"value": 0.1, "usual": 0.9, "since": 1}
        self.verdict = Collapse(record["step"], 0, "starved", {"within_reach": sign})
        return self.verdict

    return collapse


def test_it_runs_once_and_leaves_its_page(
    make: Make, tmp_path: Path, collapsing: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Then an arm of it is run again, and starves: an outcome like any other."""
    config = make(tmp_path / "x", "seeds=[3]")
    for _ in range(2):
        assert run_climb(config.as_climb(), report=lambda plan: write_report(config, plan)) == 0
    assert capsys.readouterr().out.count("── stage") == 5
    page = (tmp_path / "x" / "report" / "summary.md").read_text()
    assert "2 arms, seeds 3" in page
    assert (tmp_path / "x" / "report" / "arms.png").stat().st_size > 5_000
    # What the page says is what the stages wrote down.
    records = [
        json.loads(line) for line in (tmp_path / "x" / "late-climb-3" / "metrics.jsonl").read_text().splitlines()
    ]
    first, last = (records[i] for i in (0, -1))
    late, _ = table(config, measure(config, ClimbPlan(config.as_climb()))).records()
    assert (late["pass@1 at first"], late["pass@1 at last"]) == (first["pass@1"], last["pass@1"])
    assert late["pass@2 at last"] == last["pass@2"]

    shutil.rmtree(tmp_path / "x" / "late-climb-3")
    collapsing("late-climb-3")
    for _ in range(2):
        assert run_climb(config.as_climb(), report=lambda plan: write_report(config, plan)) == 0
    assert capsys.readouterr().out.count("── stage") == 1
    assert evaluated(tmp_path / "x" / "late-climb-3") == [0, 1]
    assert evaluated(tmp_path / "x" / "no-dropout-climb-3") == [0, 2]
    page = (tmp_path / "x" / "report" / "summary.md").read_text()
    assert page.count("`late-climb-3` (its last evaluation is of then) starved after step 1: within_reach") == 1
    assert "`no-dropout-climb-3`" not in page


def test_a_collapse_that_others_build_on_is_not(make: Make, tmp_path: Path, collapsing: Callable[[str], None]) -> None:
    """Traces of a stage that collapsed are there; its model is not."""
    collapsing("teacher-3")
    config = make(tmp_path / "x", "seeds=[3]", "stages.1.init_from=teacher")
    with pytest.raises(RunError, match="stage teacher-3: starved after step 1"):
        run_climb(config.as_climb())


def evaluated(folder: Path) -> list[int]:
    return [r["step"] for r in read_records(folder / "metrics.jsonl") if r.get("kind") == "evaluation"]


def test_the_table_goes_by_seeds(make: Make, tmp_path: Path) -> None:
    expected = "arms.1.expect={pass@1: higher, pass@4: lower, entropy: lower}"
    config = make(tmp_path / "x", "seeds=[0, 1, 2]", expected)
    values = {"late": (0.2, 0.4, 0.6), "no-dropout": (0.3, 0.4, 0.8)}
    for arm, numbers in values.items():
        for seed, number in enumerate(numbers):
            folder = tmp_path / "x" / config.measured_stage(arm, seed)
            folder.mkdir(parents=True)
            marks = [
                {"kind": "evaluation", "step": s, "pass@1": v, "pass@4": 2 * v} for s, v in ((0, 0.1), (9, number))
            ]
            steps = [{"step": s, "entropy": number + s} for s in (1, 2)]
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(mark)}\n" for mark in [*steps, *marks]))
    measured = measure(config, ClimbPlan(config.as_climb()))
    rows = table(config, measured).markdown().splitlines()
    assert rows[0].endswith("| pass@1 at last | difference at last | pass@4 at last |")
    assert "| 0.400 (0.200–0.600) |  | 0.800 (0.400–1.200) |" in rows[2]
    # Differences 0.1, 0 and 0.2: mean 0.1, standard deviation 0.1; t of two degrees of freedom, as below.
    assert "| 0.500 (0.300–0.800) | 0.100 (-0.148–0.348) | 1.000 (0.600–1.600) |" in rows[3]
    found = {claim["metric"]: claim for claim in claims(config, measured)}
    # t of two degrees of freedom: 4.302653 standard errors on each side.
    for metric, scale in (
        ("pass@1", 1),
        ("pass@4", 2),
        ("entropy", 1),
    ):  # entropy from the steps, as no evaluation has it
        claim = found[metric]
        bounds = [scale * (0.1 + sign * 4.302653 * 0.1 / 3**0.5) for sign in (-1, 1)]
        assert [claim["effect"], claim["low"], claim["high"]] == pytest.approx([scale * 0.1, *bounds])
        assert claim["verdict"] == "not seen"
    assert found["entropy"]["values"] == pytest.approx([1.8, 1.9, 2.3])
    same = make(tmp_path / "x", "seeds=[0, 1, 2]", "arms.0.expect={pass@1: lower}")  # an arm beside itself
    assert [claim["verdict"] for claim in claims(same, measured)] == ["cannot be asked"]


@pytest.mark.parametrize(
    ("low", "high", "expected", "verdict"),
    [
        (0.1, 0.2, "higher", "confirmed"),
        (0.1, 0.2, "lower", "reversed"),
        (-0.2, -0.1, "lower", "confirmed"),
        (-0.2, -0.1, "higher", "reversed"),
        (0.0, 0.2, "higher", "not seen"),
        (None, None, "higher", "one seed"),
    ],
)
def test_a_verdict_by_where_the_interval_lies(
    low: float | None, high: float | None, expected: str, verdict: str
) -> None:
    assert verdict_of(low, high, expected) == verdict
