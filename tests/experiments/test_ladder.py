"""A ladder's plan and its workers: nothing is run twice, what is killed goes on, all ends in a page."""

import json
import multiprocessing
import os
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mai_thinking.config.ladder import LadderConfig
from mai_thinking.config.loading import load_config
from mai_thinking.errors import RunError, UsageError
from mai_thinking.experiments import ladder as ladder_module
from mai_thinking.experiments import runs as runs_module
from mai_thinking.experiments.ladder import plan_ladder, plan_runs, run_ladder, with_one_yardstick
from mai_thinking.experiments.ladder import work_on as work
from mai_thinking.experiments.runs import PlannedRun
from mai_thinking.experiments.scaling.points import Point
from mai_thinking.report.ladder import write_report
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import build_model, model_config
from ranks import start_script

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
    assert len(ladder.rungs) >= 3
    for run in runs:
        active = run.architecture.parameter_counts()[1]
        per_active = run.tokens / active
        half_a_step = run.config.batch.tokens_per_step / active / 2
        assert per_active == pytest.approx(ladder.tokens_per_active_parameter, abs=half_a_step + 1e-9)
    assert [run.rung for run in runs] == sorted(run.rung for run in runs)


def test_interleaved_and_every_layer_are_equal_in_parameters_and_flops() -> None:
    runs = plan_runs(load_config(LadderConfig, LADDERS / "interleaved-vs-every-layer.yaml"))
    for one, other in zip(runs[::2], runs[1::2], strict=True):
        assert (one.variant, other.variant) == ("interleaved", "every-layer")
        # Two experts' rows in the router, of each pair of layers, and nothing else.
        rows = 2 * one.config.model["hidden_size"] * one.rung // 2
        counts = zip(one.architecture.parameter_counts(), other.architecture.parameter_counts(), strict=True)
        assert [theirs - ours for ours, theirs in counts] == [rows, rows]
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
    runs = {(run.variant, run.rung): run for run in plan_runs(ladder) if run.config.seed == 0}
    assert runs["a", 18].config.model == {"ladder": 18}
    assert runs["b", 18].config.model == {"ladder": 18, "num_experts": 256}
    total = {name: runs[name, 12].architecture.parameter_counts()[0] for name in ("a", "b")}
    assert total["a"] > 1.9 * total["b"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=5", "steps is derived"),
        ("run.schedule={warmup_steps: 5}", "schedule.warmup_steps is derived"),
        ("run.model.ladder=12", "model.ladder is derived"),
        (
            "candidates.0.overrides={optimiser: {}}",
            "tiny-ladder, slow-L1-s0: unknown key 'optimiser'; did you mean 'optimizer'",
        ),
        ("scale.hidden_size=7.5", "7.5 × 1 layers is not a whole number"),
        ("rungs=[2, 2]", "rungs: .* has one twice"),
        ("candidates.0.name=fast", "candidates: .* has one twice"),
        ("run.init_by_name=false", "init_by_name is derived"),
        ("seeds={1: 2, 2: 2}", r"seeds: name each of the rungs \[1, 2, 3, 4\]"),
        ("seeds={1: 2, 2: 2, 3: 0, 4: 1}", "seeds"),
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


def test_each_rung_may_have_seeds_of_its_own(tmp_path: Path) -> None:
    runs = plan_runs(tiny(tmp_path / "ladder", "seeds={1: 3, 2: 2, 3: 1, 4: 1}"))
    by_rung = {rung: sorted(run.config.seed for run in runs if run.rung == rung) for rung in (1, 2, 3, 4)}
    assert by_rung == {1: [0, 0, 1, 1, 2, 2], 2: [0, 0, 1, 1], 3: [0, 0], 4: [0, 0]}


def test_rungs_read_as_much_of_a_source_as_of_the_target(tmp_path: Path) -> None:
    ladder = tiny(tmp_path / "ladder", "target_tokens=100000")
    for run in plan_runs(ladder):
        assert run.config.data.down_sample == pytest.approx(min(1.0, run.tokens / 100_000))
    assert {run.config.data.down_sample for run in plan_runs(tiny(tmp_path / "ladder"))} == {1.0}


def test_a_pair_begins_with_the_same_weights_where_their_shapes_agree(tmp_path: Path) -> None:
    """More experts, and in a model without the ladder's key other numbers from there on."""
    few, many = (
        next(r.config for r in plan_runs(tiny(tmp_path, f"run.model.num_experts={n}")) if r.rung == 2) for n in (8, 16)
    )
    small, large = (build_model(config, model_config(config)).state_dict() for config in (few, many))
    differ = [name for name, tensor in small.items() if not torch.equal(tensor, large[name][: len(tensor)])]
    assert [name for name in differ if not name.endswith("experts.down_proj")] == []  # whose module's shape differs
    plain = [config.model_copy(update={"init_by_name": False}) for config in (few, many)]
    small, large = (build_model(config, model_config(config)).state_dict() for config in plain)
    assert [name for name, tensor in small.items() if not torch.equal(tensor, large[name][: len(tensor)])]
    one, other = (build_model(c, model_config(c)).state_dict() for c in (few, few.model_copy(update={"seed": 1})))
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------------------------- planning


def test_a_plan_wants_pilot_runs_and_then_proposes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = tiny(tmp_path / "ladder", "seeds=[0, 1, 2]", "difference=0.2")
    ladder.folder.mkdir(parents=True)
    with pytest.raises(UsageError, match="no run of the baseline is finished: a plan needs two seeds of three rungs"):
        plan_ladder(ladder, 10)
    pretend(monkeypatch, lambda config: 0)
    scatter = np.random.default_rng(0).standard_normal(1000)

    def read_point(run: PlannedRun) -> Point:
        noise = 0.002 * scatter[zlib.crc32(run.name.encode()) % 1000]
        loss = 3.0 * (run.flops / 1e8) ** -0.1 * np.exp(noise)
        return Point(
            config=run.variant, seed=run.config.seed, flops=run.flops, rung=run.rung, loss={"code": loss}, wall=6.0
        )

    monkeypatch.setattr(ladder_module, "read_point", read_point)
    assert work(ladder, plan_runs(ladder)) == 0
    text = plan_ladder(ladder, 60)
    assert "L2: a pair's log gain scatters by" in text
    assert "one seed of all configs takes 12 s" in text
    assert "a gain of 20% is decided with a power of 90 % by 'rungs=[" in text
    assert "cannot be decided in 0.5 minutes" in plan_ladder(ladder, 0.5)
    plan = json.loads((ladder.folder / "plan.json").read_text())
    assert (plan["minutes"], plan["deciding"], len(plan["pilots"])) == (0.5, None, 4)


# ----------------------------------------------------------------------------------------------------- evaluation


def test_all_are_evaluated_on_one_text_with_one_tokenizer(tmp_path: Path) -> None:
    base = tiny(tmp_path / "ladder")
    sources: list[dict[str, Any]] = [dict(source) for source in base.run["data"]["sources"]]
    sources[0]["weight"] = 5
    heavier = {"data": {"sources": sources}}
    (base.folder / "claims").mkdir(parents=True)

    def with_candidate(overrides: dict[str, Any]) -> LadderConfig:
        return base.model_validate(base.model_dump() | {"candidates": [{"name": "other", "overrides": overrides}]})

    ladder = with_candidate(heavier).model_copy(update={"target_tokens": 1e6})
    for before, run in zip(plan_runs(ladder), with_one_yardstick(ladder, plan_runs(ladder)), strict=True):
        assert run.config.data.down_sample == before.config.data.down_sample < 1  # its own, not the largest rung's
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
            (config.folder / "notes.json").write_text("{}")
        return code

    def read_point(run: PlannedRun) -> Point:
        return Point(config=run.variant, seed=run.config.seed, flops=run.flops, loss={"code": 3.0}, rung=run.rung)

    monkeypatch.setattr(runs_module, "pretrain", pretrain)
    monkeypatch.setattr(ladder_module, "read_point", read_point)


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
    third = ladder.folder / "runs" / "fast-L2-s0"
    script, said = ROOT / "scripts" / "ladder.py", tmp_path / "said"
    process = start_script(script, str(LADDERS / "tiny.yaml"), *overrides, output=said)
    deadline = time.monotonic() + 200
    try:
        while not list((third / "checkpoints").glob("step-*")) and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert finished(ladder) == ["fast-L1-s0", "slow-L1-s0"], said.read_text()
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
    assert "2 rungs; a fit needs at least 3" in page
    assert page.strip() in capsys.readouterr().out
    points = json.loads((ladder.folder / "points.json").read_text())["points"]
    assert [(p["config"], p["rung"]) for p in points] == [("fast", 1), ("slow", 1), ("fast", 2), ("slow", 2)]
    assert points[2]["loss"]["maths"] < points[0]["loss"]["maths"]
    assert points[2]["flops"] == pytest.approx(planned["fast-L2-s0"].flops)

    assert work_on(ladder) == 0  # nothing is left to do
    assert read_records(third / "events.jsonl") == events
