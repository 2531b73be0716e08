"""A ladder's plan and its workers: nothing is run twice, what is killed goes on, all ends in a page."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.config.ladder import LadderConfig
from mai_thinking.config.loading import load_config
from mai_thinking.errors import RunError, UsageError
from mai_thinking.experiments import ladder as ladder_module
from mai_thinking.experiments.ladder import run_ladder, with_one_yardstick, work
from mai_thinking.experiments.ladder_plan import PlannedRun, plan_runs
from mai_thinking.experiments.scaling.points import Point
from mai_thinking.report.ladder import write_report
from mai_thinking.training.metrics import read_records

ROOT = Path(__file__).parents[2]
LADDERS = ROOT / "configs" / "ladders"


def tiny(folder: Path, *overrides: str) -> LadderConfig:
    places = [f"output_dir={folder}", f"run.data.cache_dir={folder.parent / 'cache'}"]
    return load_config(LadderConfig, LADDERS / "tiny.yaml", [*places, *overrides])


# ------------------------------------------------------------------------------------------------- config and plan


@pytest.mark.parametrize("path", sorted(LADDERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ladder_of_ours_can_be_planned_and_fitted(path: Path) -> None:
    ladder = load_config(LadderConfig, path)
    runs = plan_runs(ladder)
    assert len(ladder.rungs) >= 4
    for run in runs:
        per_active = run.tokens / run.active
        half_a_step = run.config.batch.tokens_per_step / run.active / 2
        assert per_active == pytest.approx(ladder.tokens_per_active_parameter, abs=half_a_step + 1e-9)
    assert [run.rung for run in runs] == sorted(run.rung for run in runs)


def test_interleaved_and_every_layer_are_equal_in_parameters_and_flops() -> None:
    runs = plan_runs(load_config(LadderConfig, LADDERS / "interleaved-vs-every-layer.yaml"))
    for one, other in zip(runs[::2], runs[1::2], strict=True):
        assert (one.variant, other.variant) == ("interleaved", "every-layer")
        # Two experts' rows in the router, of each pair of layers, and nothing else.
        rows = 2 * one.config.model["hidden_size"] * one.rung // 2
        assert (other.total - one.total, other.active - one.active) == (rows, rows)
        assert other.config.steps == pytest.approx(one.config.steps, abs=1)
        assert len(one.config.model) > 0


def test_the_crossing_ladder_differs_in_weights_alone() -> None:
    ladder = load_config(LadderConfig, LADDERS / "diversity-crossing.yaml")
    diverse, narrow = (ladder.run_config(variant, 2, 0, 1).data.sources for variant in ladder.variants)
    assert [s.model_copy(update={"weight": 1}) for s in diverse] == [s.model_copy(update={"weight": 1}) for s in narrow]


def test_the_reports_rule_where_nothing_is_scaled(tmp_path: Path) -> None:
    tree = {"batch": {"context_length": 64, "global_batch_size": 4, "micro_batch_size": 4}}
    ladder = LadderConfig(
        name="big", run=tree, rungs=(12, 18), tokens_per_active_parameter=100, baseline={"name": "a"},
        candidates=[{"name": "b", "overrides": {"model": {"num_experts": 256}}}],
    )  # fmt: skip
    runs = {(run.variant, run.rung): run for run in plan_runs(ladder) if run.seed == 0}
    assert runs["a", 18].config.model == {"ladder": 18}
    assert runs["b", 18].config.model == {"ladder": 18, "num_experts": 256}
    assert runs["a", 12].total > 1.9 * runs["b", 12].total


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=5", "steps is derived by the ladder"),
        ("run.schedule={warmup_steps: 5}", "schedule.warmup_steps is derived"),
        ("run.model.ladder=12", "model.ladder is derived"),
        (
            "candidates.0.overrides={optimiser: {}}",
            "tiny-ladder, slow: unknown key 'optimiser'; did you mean 'optimizer'",
        ),
        ("scale.hidden_size=7.5", "7.5 × 1 layers is not a whole number"),
        ("rungs=[2, 2]", "rungs: .* has one twice"),
        ("candidates.0.name=fast", "candidates: .* has one twice"),
        ("rungs=[0]", "rungs.0: input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tiny(tmp_path / "ladder", override)
    assert "\n" not in str(caught.value)


def test_a_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without a launcher"):
        run_ladder(tiny(tmp_path / "ladder"))


# ----------------------------------------------------------------------------------------------------- evaluation


def test_all_are_evaluated_on_one_text_with_one_tokenizer(tmp_path: Path) -> None:
    base = tiny(tmp_path / "ladder")
    sources: list[dict[str, Any]] = [dict(source) for source in base.run["data"]["sources"]]
    sources[0]["weight"] = 5
    heavier = {"data": {"sources": sources}}
    (base.folder / "claims").mkdir(parents=True)

    def with_candidate(overrides: dict[str, Any]) -> LadderConfig:
        return base.model_validate(base.model_dump() | {"candidates": [{"name": "other", "overrides": overrides}]})

    ladder = with_candidate(heavier)
    configs = {run.variant: run.config for run in with_one_yardstick(ladder, plan_runs(ladder))}
    assert configs["fast"].data.tokenizer.path is None
    assert configs["other"].data.tokenizer.path == str(ladder.folder / "tokenizer")
    assert (ladder.folder / "tokenizer" / "tokenizer.json").is_file()
    fewer = [sources[0] | {"held_out": False}, sources[1]]
    ladder = with_candidate({"data": {"sources": fewer}})
    with pytest.raises(UsageError, match=r"'other' is evaluated on other text than the baseline \(general\)"):
        with_one_yardstick(ladder, plan_runs(ladder))


# ----------------------------------------------------------------------------------------------- workers and claims

Trainer = Callable[[Any], int]


def pretend(monkeypatch: pytest.MonkeyPatch, train: Trainer) -> None:
    """Runs that take no time: `train(config)` stands for pre-training, and leaves a finished run if it returns 0."""

    def pretrain(config: Any) -> int:
        code = train(config)
        if code == 0:
            (config.folder / "final").mkdir(parents=True)
        return code

    def read_point(run: PlannedRun) -> Point:
        return Point(config=run.variant, seed=run.seed, flops=run.flops, loss={"code": 3.0}, rung=run.rung)

    for stand_in in (pretrain, read_point):
        monkeypatch.setattr(ladder_module, stand_in.__name__, stand_in)


def work_on(ladder: LadderConfig) -> int:
    return work(ladder, plan_runs(ladder))


def finished(ladder: LadderConfig) -> list[str]:
    return sorted(path.parent.name for path in (ladder.folder / "runs").glob("*/final"))


def test_two_workers_share_the_runs_and_take_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = tiny(tmp_path / "ladder", "seeds=[0, 1, 2]")
    diary = tmp_path / "diary.txt"

    def train(config: Any) -> int:
        with diary.open("a") as file:
            file.write(f"{config.name} {os.getpid()}\n")
        time.sleep(0.03)
        return 0

    pretend(monkeypatch, train)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work_on, args=(ladder,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    entries = [line.split() for line in diary.read_text().splitlines()]
    assert sorted(name for name, _ in entries) == finished(ladder) == sorted(r.name for r in plan_runs(ladder))
    assert len({pid for _, pid in entries}) == 3


def test_the_claim_of_a_dead_worker_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = tiny(tmp_path / "ladder", "rungs=[1]")
    fork = multiprocessing.get_context("fork")
    training = fork.Event()

    def hang(config: Any) -> int:
        training.set()
        time.sleep(60)
        return 0

    with monkeypatch.context() as patch:
        pretend(patch, hang)
        process = fork.Process(target=work_on, args=(ladder,))
        process.start()
        assert training.wait(20)
    taken: list[str] = []
    pretend(monkeypatch, lambda config: taken.append(config.name) or 0)  # type: ignore[func-returns-value]
    assert work_on(ladder) == 0
    assert taken == ["slow-L1-s0"]  # the first is the other's while it lives
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert work_on(ladder) == 0
    assert taken == ["slow-L1-s0", "fast-L1-s0"]


def test_a_stop_from_outside_is_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def train(config: Any) -> int:
        names.append(config.name)
        os.kill(os.getpid(), signal.SIGTERM)
        return 75

    pretend(monkeypatch, train)
    assert work_on(tiny(tmp_path / "ladder")) == 75
    assert len(names) == 1


def test_a_run_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Any) -> int:
        if config.name == "slow-L2-s0":
            raise RunError("step 3: the loss is not finite")
        return 0

    pretend(monkeypatch, train)
    ladder = tiny(tmp_path / "ladder")
    assert work_on(ladder) == 1
    assert "slow-L2-s0 failed: step 3: the loss is not finite" in capsys.readouterr().out
    assert len(finished(ladder)) == 7


# ------------------------------------------------------------------------------------------------------ end to end


def test_killed_and_started_again_it_spends_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing: SIGKILL in the third run; then finished runs stay as they are, the third goes on from its
    checkpoint, and the page has all of them."""
    overrides = ["rungs=[1, 2]", "seeds=[0]", "run.checkpoint.every=5", f"output_dir={tmp_path / 'ladder'}"]
    overrides.append(f"run.data.cache_dir={tmp_path / 'cache'}")
    ladder = load_config(LadderConfig, LADDERS / "tiny.yaml", overrides)
    command = [sys.executable, str(ROOT / "scripts" / "ladder.py"), str(LADDERS / "tiny.yaml"), *overrides]
    third = ladder.folder / "runs" / "fast-L2-s0"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    try:
        while not list((third / "checkpoints").glob("step-*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
    output = process.communicate()[0]
    assert finished(ladder) == ["fast-L1-s0", "slow-L1-s0"], output
    before = {name: (ladder.folder / "runs" / name / "events.jsonl").read_bytes() for name in finished(ladder)}

    planned = {run.name: run for run in plan_runs(ladder)}
    assert run_ladder(ladder, report=write_report) == 0
    for name, events in before.items():
        assert (ladder.folder / "runs" / name / "events.jsonl").read_bytes() == events
    events = read_records(third / "events.jsonl")
    assert sum(event["event"] == "attempt" for event in events) == 2
    again = [event["step"] for event in events if event["event"] == "step"]
    assert len(again) - len(set(again)) <= 5 + 5  # no more than a checkpoint's worth, and the one being written
    assert max(again) == planned["fast-L2-s0"].config.steps
    assert not (third / "checkpoints").exists()
    page = (ladder.folder / "report" / "summary.md").read_text()
    assert "**slow: undecided**" in page
    assert "2 rungs; a fit needs at least 4" in page
    assert page.strip() in capsys.readouterr().out
    points = json.loads((ladder.folder / "points.json").read_text())["points"]
    assert [(p["config"], p["rung"]) for p in points] == [("fast", 1), ("slow", 1), ("fast", 2), ("slow", 2)]
    assert points[2]["loss"]["maths"] < points[0]["loss"]["maths"]
    assert points[2]["flops"] == pytest.approx(planned["fast-L2-s0"].flops)

    assert work_on(ladder) == 0  # nothing is left to do
    assert read_records(third / "events.jsonl") == events
