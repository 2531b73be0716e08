"""The collapse detector: real and made-up climbs that are well, collapses of several kinds, and a damaged one."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damaged_grpo import AT, damaged_step
from simulated_climbs import KINDS, SimulatedClimb

from mai_thinking.config.grpo import CollapseSection, GrpoConfig
from mai_thinking.config.loading import load_config, save_config
from mai_thinking.provenance.lineage import require_own
from mai_thinking.recipes.grpo import grpo
from mai_thinking.rl.collapse import COLLAPSE, Collapse, CollapseDetector, is_repetitive
from mai_thinking.rl.problem_filter import FilterCounts
from mai_thinking.rl.traces import FOLDER
from mai_thinking.training.metrics import read_records
from mai_thinking.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
REAL = json.loads((Path(__file__).parent / "real_climbs.json").read_text())
"""Climbs of nano. A row a step: entropy, grad_norm, pass_rate; where the buffer was filled also mismatch, groups
kept, too hard, too easy. Three think. Of the others two are well by their held-out problems: in one, entropy narrows
while more problems are too hard for a time; the other ends with all tasks solved, and its entropy rises fivefold and
falls on the way. In the last the learning rate goes up from nothing to thirty times the config's in 60 steps; pass@1
falls from 0.66 to 0.53 (no detector was on the watch yet)."""
THINKING = ["thinking 0", "thinking 1", "thinking 2"]  # configs/nano-think-grpo.yaml, a seed each
HEALTHY = ["narrowing for a time", "to the end", *THINKING]
Record = dict[str, Any]


def filled(kept: int, hard: int, easy: int) -> Record:
    dropped = {"early_too_hard": 0, "early_too_easy": 0, "too_hard": hard, "too_easy": easy}
    return {"groups_kept": kept, **{f"groups_dropped/{rule}": number for rule, number in dropped.items()}}


def real_records(name: str) -> Iterator[Record]:
    for step, (entropy, grad_norm, pass_rate, *rest) in enumerate(REAL[name], start=1):
        record = {"step": step, "entropy": entropy, "grad_norm": grad_norm, "pass_rate": pass_rate}
        if rest:
            mismatch, *groups = rest
            record |= filled(*groups) | ({} if mismatch is None else {"mismatch": mismatch})
        yield record


def made_up(seed: int, steps: int, *, damage: dict[str, float] | None = None, at: int = 10**9) -> Iterator[Record]:
    """A noisy climb, its buffer filled every second step; from the record of step `at` on, `damage` multiplies."""
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        by = (damage or {}) if step >= at else {}
        reach = min(0.95, 0.6 + 0.001 * step) * by.get("reach", 1)
        record = {
            "step": step,
            "entropy": 0.3 * math.exp(draw.gauss(0, 0.25)) * by.get("entropy", 1),
            "grad_norm": 0.3 * math.exp(draw.gauss(0, 0.4)) * by.get("grad_norm", 1),
            "pass_rate": draw.gauss(0.3, 0.05) * by.get("pass_rate", 1),
            "repetition": min(1.0, max(0.0, draw.gauss(0.01, 0.01)) * by.get("repetition", 1)),
        }
        if step % 2:
            kept = sum(draw.random() < reach for _ in range(48))
            record |= filled(kept, 48 - kept, 0) | {"mismatch": 5e-6 * by.get("mismatch", 1)}
        yield record


def verdict_on(records: Iterator[Record], **section: Any) -> Collapse | None:
    detector = CollapseDetector(CollapseSection(**section))
    return next((verdict for record in records if (verdict := detector.update(record))), None)


@pytest.mark.parametrize("name", HEALTHY)
def test_real_climbs_that_are_well_are_left_alone(name: str) -> None:
    assert verdict_on(real_records(name)) is None
    assert verdict_on(real_records(name), threshold=5.0) is None  # and not by a hair


def going_on(name: str, seed: int, lasts: int) -> Iterator[tuple[float, Record]]:
    """A real climb, then `lasts` more records drawn from its last; of their problems a share that grows from 0 to 1 is
    no longer solved."""
    draw, rows = random.Random(seed), REAL[name]
    for step in range(1, len(rows) + lasts + 1):
        entropy, grad_norm, pass_rate, mismatch, *groups = (
            rows[step - 1] if step <= len(rows) else draw.choice(rows[-25:])
        )
        ill = max(0, step - len(rows)) / lasts
        kept, hard, easy = groups
        lost = [sum(draw.random() < ill for _ in range(number)) for number in (kept, easy)]
        record = {"step": step, "entropy": entropy, "grad_norm": grad_norm, "pass_rate": pass_rate}
        record |= {} if mismatch is None else {"mismatch": mismatch}
        yield ill, record | filled(kept - lost[0], hard + sum(lost), easy - lost[1])


@pytest.mark.parametrize("name", THINKING)
def test_a_real_climb_that_rots_is_found(name: str) -> None:
    """Before half of what it had gained is lost."""
    rows = [(kept * rate + easy) / (kept + hard + easy) for _, _, rate, _, kept, hard, easy in REAL[name] if kept]
    half = (1 - sum(rows[:5]) / 5 / (sum(rows[-25:]) / 25)) / 2
    for seed in range(3):
        for lasts in (40, 100, 200):
            detector = CollapseDetector(CollapseSection())
            found = next(ill for ill, record in going_on(name, seed, lasts) if detector.update(record))
            assert 0 < found <= half


def test_a_real_climb_that_is_pushed_too_hard_is_stopped() -> None:
    """It comes to solve a problem always or never: what it solves hardly changes, but little can be learned."""
    verdict = verdict_on(real_records("ramp"))
    assert verdict is not None
    assert set(verdict.evidence) == {"solved", "entropy_low"}
    # At step 20 the rate is tenfold; from then on entropy is out of what was usual.
    assert 15 <= verdict.last_good_step <= 22
    assert verdict.step <= 50


def test_noise_is_no_collapse() -> None:
    assert all(verdict_on(made_up(seed, 300)) is None for seed in range(20))


@pytest.mark.parametrize(
    ("damage", "signs"),
    [
        ({"reach": 0.2, "entropy": 6}, {"solved", "entropy_high"}),
        ({"reach": 0.3, "entropy": 0.1}, {"solved", "entropy_low"}),
        ({"pass_rate": 0.2, "repetition": 60}, {"solved", "repetition"}),
        ({"pass_rate": 0.2, "mismatch": 1e4, "grad_norm": 30}, {"solved", "mismatch", "grad_norm"}),
        ({"pass_rate": 0.1, "reach": 0.3}, {"solved"}),
    ],
)
def test_a_collapse_is_found_within_20_steps_and_its_beginning_too(damage: dict[str, float], signs: set[str]) -> None:
    for seed in range(10):
        verdict = verdict_on(made_up(seed, 200, damage=damage, at=101))
        assert verdict is not None
        assert 101 <= verdict.step <= 120
        # The weights of step 99 gave the last good record; some of its noise may look like the beginning.
        assert 80 <= verdict.last_good_step <= 100
        assert signs <= set(verdict.evidence)
        assert str(verdict.last_good_step) in str(verdict)
        assert "\n" not in str(verdict)


@pytest.mark.parametrize("damage", [{"entropy": 8}, {"entropy": 0.1}, {"grad_norm": 20}, {"repetition": 50}])
def test_without_harm_there_is_no_collapse(damage: dict[str, float]) -> None:
    assert verdict_on(made_up(3, 200, damage=damage, at=101)) is None


def test_one_wild_filling_is_no_collapse() -> None:
    records = list(made_up(1, 150))
    records[100] |= filled(0, 48, 0) | {"entropy": 9.0}
    assert verdict_on(iter(records)) is None


def test_easy_problems_that_drop_out_are_no_harm() -> None:
    """What is left to learn from is harder: its pass rate falls while more is solved, and entropy with it."""
    records = list(made_up(1, 200))
    for record in records[100:]:
        record.update(pass_rate=record["pass_rate"] / 4, entropy=record["entropy"] / 5)
        if "groups_kept" in record:
            record |= filled(16, 0, 32)
    assert verdict_on(iter(records)) is None


@pytest.mark.parametrize("unsolvable", [0.0, 0.3, 0.5])
def test_what_nobody_can_solve_is_no_harm(unsolvable: float) -> None:
    """A policy comes to solve all that it can: ever less of the rest is within reach."""
    draw, detector = random.Random(2), CollapseDetector(CollapseSection())
    for step in range(1, 300):
        easy = min(0.97, step / 200) * (1 - unsolvable)
        counts = [0, 0, 0]
        for _ in range(48):
            counts[draw.choices((0, 1, 2), (1 - unsolvable - easy, unsolvable, easy))[0]] += 1
        record = {"step": step, "pass_rate": 0.4, "entropy": math.exp(-step / 100), "grad_norm": 0.3}
        assert detector.update(record | filled(*counts)) is None
    nothing_left = FilterCounts(too_hard=round(1000 * unsolvable), too_easy=1000 - round(1000 * unsolvable), kept=2)
    assert not detector.hopeless(nothing_left)
    assert not detector.harder(nothing_left), "solved, not starved"
    assert nothing_left.solved
    assert detector.harder(FilterCounts(too_hard=900, too_easy=100))


def simulated(seed: int, sickness: str = "") -> tuple[SimulatedClimb, Collapse | None]:
    climb = SimulatedClimb(seed, sickness)
    return climb, verdict_on(climb.records())


def false_alarms(seeds: range) -> list[tuple[int, str]]:
    return [(seed, str(verdict)) for seed in seeds if (verdict := simulated(seed)[1])]


def found_in_time(seeds: range) -> list[tuple[int, str, bool]]:
    """Of the climbs that rose and fell ill: whether the verdict came after that, and before half of what was gained was
    lost."""
    found = []
    for seed in seeds:
        sickness = KINDS[seed % len(KINDS)]
        climb, verdict = simulated(seed, sickness)
        start, peak, last = climb.truth[0], max(climb.truth[: climb.onset]), climb.truth[-1]
        if verdict is not None and verdict.step <= climb.onset:
            found.append((seed, sickness, False))  # a false alarm
        elif len(climb.truth) > climb.onset and peak - start > 0.1:
            found.append((seed, sickness, verdict is not None and bool(last >= start + (peak - start) / 2)))
    return found


def test_simulated_climbs() -> None:
    assert false_alarms(range(12)) == []
    found = found_in_time(range(1000, 1012))
    assert len(found) >= 8
    assert sum(in_time for _, _, in_time in found) >= len(found) - 1, found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_healthy_and_two_hundred_sick_climbs() -> None:
    alarms = false_alarms(range(200))
    assert len(alarms) <= 2, alarms
    found = found_in_time(range(1000, 1225))
    assert len(found) >= 200
    missed = [(seed, sickness) for seed, sickness, in_time in found if not in_time]
    assert len(missed) <= 0.05 * len(found), missed


@pytest.mark.parametrize("cut", [3, 99, 104, 150])
def test_it_goes_on_exactly_from_its_state(cut: int) -> None:
    records = list(made_up(5, 200, damage={"reach": 0.2, "entropy": 6}, at=101))
    whole, first, second = (CollapseDetector(CollapseSection()) for _ in range(3))
    for record in records[:cut]:
        first.update(record)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    for record in records:
        whole.update(record)
    for record in records[cut:]:
        second.update(record)
    assert second.state_dict() == whole.state_dict()
    assert second.verdict == whole.verdict is not None


# ------------------------------------------------------------------------------------------------ a buffer never filled


def detector_after(fillings: list[tuple[int, int]]) -> CollapseDetector:
    """(problems, of them within reach) in each."""
    detector = CollapseDetector(CollapseSection())
    for index, (problems, reached) in enumerate(fillings):
        detector.update({"step": 2 * index + 1, "pass_rate": 0.3, **filled(reached, problems - reached, 0)})
    return detector


def test_a_filling_is_given_up_when_it_is_hopeless() -> None:
    detector = detector_after([(64, 32), (48, 32)])
    batches = next(n for n in range(100) if detector.hopeless(FilterCounts(too_hard=8 * n, early_too_hard=8 * n)))
    assert 2 <= batches <= 4
    assert not detector.hopeless(FilterCounts(too_easy=1000))
    assert not detector.hopeless(FilterCounts(too_easy=1000, too_hard=5))
    assert not CollapseDetector(CollapseSection()).hopeless(FilterCounts(too_hard=1000))
    verdict = detector.starve(4, FilterCounts(too_hard=62, kept=2))
    assert (verdict.step, verdict.last_good_step, verdict.verdict) == (4, 2, "starved")
    assert verdict.evidence["within_reach"]["value"] == pytest.approx(2 / 64)
    assert verdict.evidence["within_reach"]["usual"] == pytest.approx(64 / 112)


@pytest.mark.parametrize("reach", [0.02, 0.1, 0.5, 0.98])
def test_chance_alone_is_not_hopeless(reach: float) -> None:
    """Small histories, each batch looked at: where nothing changed nothing is given up."""
    draw = random.Random(4)
    for _ in range(300):
        detector = detector_after([(12, sum(draw.random() < reach for _ in range(12))) for _ in range(2)])
        counts = FilterCounts()
        for _ in range(60):
            kept = sum(draw.random() < reach for _ in range(4))
            counts.update(kept=kept, too_hard=4 - kept)
            assert not detector.hopeless(counts)


def test_repetition_is_a_loop_of_tokens() -> None:
    assert is_repetitive([7] * 16)
    assert is_repetitive([1, 2, 3, 4, 5] * 6)
    assert is_repetitive(list(range(20)) + [3, 4] * 30)
    assert not is_repetitive([7] * 15)  # too short to tell
    assert not is_repetitive(list(range(100)))
    assert not is_repetitive(list(range(40)) * 2 + list(range(50, 60)))  # said twice, as a check of an answer may
    draw = random.Random(0)
    assert not any(is_repetitive([draw.randrange(10) for _ in range(60)]) for _ in range(100))


# -------------------------------------------------------------------------------------------------- a climb, damaged


@pytest.fixture(scope="module")
def make(tiny_run: Path) -> Callable[..., GrpoConfig]:
    def config(folder: Path, *overrides: str) -> GrpoConfig:
        places = [f"output_dir={folder}", f"init_from={tiny_run / 'final'}", "steps=30", "evaluation.every=100"]
        return load_config(GrpoConfig, ROOT / "configs" / "tiny-grpo.yaml", [*places, *overrides])

    return config


@pytest.fixture(scope="module")
def collapsed(make: Callable[..., GrpoConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collapse") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "take_step", damaged_step)
        assert grpo(make(folder)) == 3
    return folder


def steps_of(folder: Path) -> int:
    return sum("kind" not in record for record in read_records(folder / "metrics.jsonl"))


def test_a_collapse_ends_the_run(
    collapsed: Path, make: Callable[..., GrpoConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    written = json.loads((collapsed / COLLAPSE).read_text())
    assert set(written) == {"step", "last_good_step", "verdict", "evidence"}
    assert written["step"] == steps_of(collapsed) == AT - 1
    assert written["verdict"] == "starved"
    assert 0 < written["last_good_step"] < written["step"]
    assert written["evidence"]
    assert not (collapsed / "final").exists()
    assert (collapsed / "checkpoints" / f"step-{written['step']:08d}").is_dir()
    assert read_records(collapsed / "events.jsonl")[-1]["how"] == "collapsed"
    assert all("repetition" in r for r in read_records(collapsed / "metrics.jsonl") if "kind" not in r)
    require_own(collapsed / FOLDER, allow_third_party=False)
    before = {path: path.stat().st_mtime_ns for path in collapsed.rglob("*")}
    capsys.readouterr()
    assert grpo(make(collapsed)) == 3
    assert "has collapsed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in collapsed.rglob("*")} == before


def test_a_run_that_died_before_the_verdict_was_written_comes_to_it_again(
    collapsed: Path, make: Callable[..., GrpoConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_signal(self: Trainer) -> None:
        if self.step + 1 == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        damaged_step(self)

    monkeypatch.setattr(Trainer, "take_step", with_signal)
    assert grpo(make(tmp_path / "run")) == 75
    monkeypatch.setattr(Trainer, "take_step", damaged_step)
    for _ in range(2):
        assert grpo(make(tmp_path / "run")) == 3
        written = (tmp_path / "run" / COLLAPSE).read_text()
        assert json.loads(written) == json.loads((collapsed / COLLAPSE).read_text())
        (tmp_path / "run" / COLLAPSE).unlink()


def test_switched_off_it_lets_a_collapsed_run_go_on(
    collapsed: Path, make: Callable[..., GrpoConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Trainer) -> None:
        raise InterruptedError

    monkeypatch.setattr(Trainer, "take_step", stop)
    with pytest.raises(InterruptedError):
        grpo(make(collapsed, "collapse.enabled=false"))


def test_all_ranks_come_to_the_verdict_and_the_launcher_passes_it_on(
    make: Callable[..., GrpoConfig], tmp_path: Path
) -> None:
    save_config(make(tmp_path / "run"), tmp_path / "config.yaml")
    script = str(Path(__file__).parent / "damaged_grpo.py")
    command = [sys.executable, "scripts/launch.py", "--nproc", "2", script, str(tmp_path / "config.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    assert json.loads((tmp_path / "run" / COLLAPSE).read_text())["step"] == steps_of(tmp_path / "run") == AT - 1
