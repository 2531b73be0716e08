"""The whole climb on a short plan of tiny stages: order, resumption, what is run again, collapse, the page."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from checksums import sha256_of
from mai_thinking.config.climb import ClimbConfig
from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config, save_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.errors import RunError, UsageError
from mai_thinking.experiments.climb import run_climb
from mai_thinking.experiments.plan import ClimbPlan
from mai_thinking.launch.goodput import account_of
from mai_thinking.provenance.lineage import read_lineage, require_own
from mai_thinking.recipes.pretrain import PretrainRecipe
from mai_thinking.report.summary import write_report, write_summary
from mai_thinking.rl.collapse import Collapse, CollapseDetector
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model
from ranks import start_script

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIGS = ROOT / "configs"
TIMINGS = {"tokens_per_second", "seconds", "rollout_seconds", "data_wait"}
Make = Callable[..., ClimbConfig]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(folder, "key=value", …)`: four short stages; prepared data is shared."""
    cache = tmp_path_factory.mktemp("cache")
    file = cache / "short.yaml"
    tiny, grpo, distill = (str(CONFIGS / name) for name in ("tiny.yaml", "tiny-grpo.yaml", "tiny-distill.yaml"))
    quick = {"evaluation.every": 100, "evaluation.problems": 2, "checkpoint.every": 2}
    stages = [
        {
            "name": "pretrain", "run": "pretrain", "config": tiny, "seconds_per_step": 2.0,
            "set": {"steps": 5, "data.cache_dir": str(cache), "evaluation.max_bytes": 500, "checkpoint.every": 2},
        },
        {"name": "first", "run": "grpo", "config": grpo, "init_from": "pretrain", "set": {"steps": 4} | quick},
        {
            "name": "self", "run": "self_distill", "config": distill, "init_from": "pretrain",
            "traces": [{"stage": "first"}], "set": {"steps": 2, "checkpoint.every": 1}, "seconds_per_step": 3.0,
        },
        {"name": "last", "run": "grpo", "config": grpo, "init_from": "self", "set": {"steps": 2} | quick},
    ]  # fmt: skip
    file.write_text(yaml.safe_dump({"name": "short", "stages": stages}))

    def config(folder: Path, *overrides: str) -> ClimbConfig:
        return load_config(ClimbConfig, file, [f"output_dir={folder}", *overrides])

    return config


@pytest.fixture(scope="module")
def climbed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished, undisturbed climb."""
    folder = tmp_path_factory.mktemp("climb") / "short"
    assert run_climb(make(folder), report=write_report, report_stage=write_summary) == 0
    return folder


def trace(folder: Path) -> dict[str, Any]:
    """Of every stage, all that must not depend on what happened on the way."""
    return {
        run.parent.name: (
            sha256_of(load_model(run).state_dict()),
            [
                json.dumps({k: v for k, v in record.items() if k not in TIMINGS})
                for record in read_records(run.parent / "metrics.jsonl")
            ],
        )
        for run in sorted(folder.glob("*/final"))
    }


def states(plan: ClimbPlan) -> dict[str, str]:
    return {stage.name: stage.state for stage in plan.stages}


# ------------------------------------------------------------------------------------------------------------ the plan


def test_a_stage_begins_with_what_the_plan_says(make: Make, tmp_path: Path) -> None:
    plan = ClimbPlan(make(tmp_path / "x", "stages.1.init_from=pretrain", "stages.3.set.seed=7"))
    pretrain, first, distilled, last = (stage.config for stage in plan.stages)
    assert isinstance(pretrain, PretrainConfig)
    assert isinstance(first, GrpoConfig)
    assert isinstance(distilled, DistillConfig)
    assert (pretrain.init_from, first.init_from) == (None, str(tmp_path / "x" / "pretrain" / "final"))
    assert distilled.traces[0].run == str(tmp_path / "x" / "first")
    assert distilled.folder == tmp_path / "x" / "self"
    assert (last.seed, last.steps) == (7, 2)
    assert len({pretrain.seed, first.seed, distilled.seed}) == 3
    other = ClimbPlan(make(tmp_path / "x", "seed=1"))
    assert {stage.config.seed for stage in other.stages}.isdisjoint({pretrain.seed, first.seed, distilled.seed})


def test_mid_training_reads_with_its_parents_tokenizer(tmp_path: Path) -> None:
    for name in ("tiny", "nano"):
        config = load_config(ClimbConfig, CONFIGS / f"{name}-climb.yaml", [f"output_dir={tmp_path}"])
        mid = ClimbPlan(config).stages[1].config
        assert isinstance(mid, PretrainConfig)
        assert mid.init_from == mid.data.tokenizer.path == str(tmp_path / "pretrain" / "final")


def test_the_nano_climb_is_planned_for_less_than_an_hour(tmp_path: Path) -> None:
    plan = ClimbPlan(load_config(ClimbConfig, CONFIGS / "nano-climb.yaml", [f"output_dir={tmp_path}"]))
    left = [plan.seconds_left(stage) for stage in plan.stages]
    assert 40 < sum(seconds for seconds in left if seconds is not None) / 60 < 60
    assert None not in left


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.1.init_from=pretrian"], "did you mean 'pretrain'"),
        (["stages.0.init_from=last"], "no earlier stage 'last'"),
        (["stages.2.traces.0.stage=pretrain"], "'pretrain' does not climb"),
        (["stages.3.init_from=null", "stages.3.rollback_of=pretrain"], "'pretrain' does not climb"),
        (["stages.3.rollback_of=first"], "remove one"),
        (["stages.2.traces=[]"], "traces"),
        (["stages.3.name=first"], "used twice"),
        (["stages.3.name=report"], "climb's own"),
        (["stages.1.set={stepz: 3}"], "stage 'first': unknown key 'stepz'; did you mean 'steps'"),
        (["stages.1.config=nowhere.yaml"], "nowhere.yaml: no such config"),
        (["stages.3.name=first-on", f"reset={{config: {CONFIGS / 'tiny-distill.yaml'}}}"], "'first' may need the name"),
    ],
)
def test_what_does_not_fit_is_refused(make: Make, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        ClimbPlan(make(tmp_path / "x", *overrides))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------- a climb that is done


def test_it_leaves_a_page(climbed: Path) -> None:
    page = (climbed / "report" / "summary.md").read_text()
    for stage in ("pretrain", "first", "self", "last"):
        assert f"| {stage} |" in page
    assert "random-weights" in page
    assert "files are as they were recorded" in page
    assert "**then** (first, after 0 steps)" in page
    assert "**now** (last, after 2 steps)" in page
    numbers = json.loads((climbed / "report" / "summary.json").read_text())
    last = read_records(climbed / "last" / "metrics.jsonl")[-1]
    assert [row["pass@1 after"]["value"] for row in numbers["held_out"]] == [
        last[f"pass@1/{row['task']}"] for row in numbers["held_out"]
    ]
    for name in ("climb", "training"):
        assert (climbed / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    kinds = [
        record.kind for record in require_own(climbed / "last" / "final", allow_third_party=False).records.values()
    ]
    assert kinds.count("random-weights") == 1
    assert "traces" in kinds


def test_each_stage_accounts_for_its_own_time(climbed: Path) -> None:
    """In one process, the later ones do not count what went before them."""
    accounts = [account_of(climbed / name) for name in ("pretrain", "first", "self", "last")]
    for before, after in itertools.pairwise(accounts):
        assert after.begin >= before.begin + before.wall_clock - 0.5


def test_nothing_is_run_again(climbed: Path, make: Make) -> None:
    before = {path: path.read_bytes() for path in climbed.glob("*/events.jsonl")}
    assert len(before) == 4
    assert set(states(ClimbPlan(make(climbed))).values()) == {"finished"}
    assert run_climb(make(climbed)) == 0
    assert before == {path: path.read_bytes() for path in climbed.glob("*/events.jsonl")}


def test_the_estimate_goes_by_what_was_measured(climbed: Path, make: Make) -> None:
    plan = ClimbPlan(make(climbed, "stages.2.set.steps=40"))
    pretrain, _, again, last = plan.stages
    assert plan.seconds_left(pretrain) == 0
    assert plan.seconds_left(again) == pytest.approx(3.0 * 40 * pretrain.seconds / (2.0 * 5))
    assert plan.seconds_left(last) is None  # nothing is declared of it, and what there is will be run again
    assert "to do again: steps" in plan.text()


def test_what_has_changed_is_run_again_and_nothing_lost(climbed: Path, make: Make, tmp_path: Path) -> None:
    changed = make(climbed, "stages.2.set.steps=3")
    assert states(ClimbPlan(changed)) == {
        "pretrain": "finished", "first": "finished", "self": "changed", "last": "waits"
    }  # fmt: skip
    before = trace(climbed)
    events = {name: (climbed / name / "events.jsonl").read_bytes() for name in ("pretrain", "first")}
    assert run_climb(changed) == 0
    after = trace(climbed)
    assert events == {name: (climbed / name / "events.jsonl").read_bytes() for name in events}
    assert before["self"] == after["self-old-1"] != after["self"]
    assert before["last"] == after["last-old-1"] != after["last"]
    # And back again, so that the other tests find what they expect: the same inputs give the same bits.
    assert run_climb(make(climbed)) == 0
    assert {name: trace(climbed)[name] for name in before} == before
    assert (climbed / "self-old-2").is_dir()


# ------------------------------------------------------------------------------------------ stopped, killed, collapsed


def test_a_signal_at_the_end_of_a_stage_stops_the_climb(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the stage itself does not ask any more."""
    report = PretrainRecipe.report  # after the last evaluation

    def with_signal(self: PretrainRecipe, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        report(self, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(PretrainRecipe, "report", with_signal)
        assert run_climb(make(tmp_path / "x")) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert states(ClimbPlan(make(tmp_path / "x"))) == {
        "pretrain": "finished", "first": "to do", "self": "to do", "last": "to do"
    }  # fmt: skip


def wait_for(text: str, file: Path) -> None:
    deadline = time.monotonic() + 120
    while text not in file.read_text():
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.01)


def test_processes_share_a_climb_and_take_over_from_a_dead_one(climbed: Path, make: Make, tmp_path: Path) -> None:
    """One is held in `first`; another one takes `second`, waits, and can be stopped; when the first is dead, a third
    goes on with what it was in, to the same bits."""
    config = make(tmp_path / "x")
    second = config.stages[1].model_copy(update={"name": "second"})
    config = config.model_copy(update={"stages": (*config.stages[:2], second)})
    save_config(config, tmp_path / "shared.yaml")
    processes: list[Any] = []

    def start(name: str) -> tuple[Any, Path]:
        script, output = ROOT / "scripts" / "climb.py", tmp_path / name
        processes.append(start_script(script, str(tmp_path / "shared.yaml"), output=output))
        return processes[-1], output

    try:
        held, said_by_held = start("held.txt")
        wait_for("── stage first", said_by_held)
        os.kill(held.pid, signal.SIGSTOP)
        other, said_by_other = start("other.txt")
        wait_for("waiting for other processes, which run first", said_by_other)
        assert states(ClimbPlan(config))["second"] == "finished"
        assert states(ClimbPlan(config))["first"] != "finished"
        other.terminate()
        other.join(60)
        assert other.exitcode == 75, said_by_other.read_text()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert "── stage second" not in said_by_held.read_text()
    assert run_climb(config) == 0
    assert set(states(ClimbPlan(config)).values()) == {"finished"}
    assert trace(tmp_path / "x")["first"] == trace(climbed)["first"]


def collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every RL run that gets as far collapses at its step 3; what came before step 2 was good."""
    update = CollapseDetector.update

    def collapsing(self: CollapseDetector, record: Any) -> Collapse | None:
        update(self, record)
        if record["step"] == 3:
            self.verdict = Collapse(3, 2, "collapsed", {"solved": {"value": 0.1, "usual": 0.9, "since": 3}})
        return self.verdict

    monkeypatch.setattr(CollapseDetector, "update", collapsing)


RESET = f"reset={{config: {CONFIGS / 'tiny-distill.yaml'}, set: {{steps: 2}}}}"


def test_a_collapse_is_answered_and_rolled_back(
    climbed: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`first` has four steps and collapses at the third, with checkpoints of the second and of the end. `first-on` goes
    on with the two that are left at another rate; `last` goes back to the checkpoint, with that rate."""
    collapse(monkeypatch)
    rate = {"optimizer.learning_rate": 1e-3}
    back = {"init_from": None, "rollback_of": "first", "set": {"steps": 2, "evaluation.every": 100} | rate}
    changes = [f"reset.set_on={json.dumps(rate)}", *(f"stages.3.{key}={json.dumps(back[key])}" for key in back)]
    config = make(tmp_path / "x", RESET, f"reset.set.init_from={climbed}/self/final", *changes)
    before = ClimbPlan(config).stages[-1]
    assert (before.state, before.parents) == ("to do", (tmp_path / "x" / "first" / "checkpoints",))
    assert run_climb(config, report=write_report) == 0
    plan = ClimbPlan(config)
    assert not plan.ready
    assert [stage.name for stage in plan.stages] == ["pretrain", "first", "first-reset", "first-on", "self", "last"]
    assert states(plan)["first"] == "collapsed"
    first, reset, on, distilled = (stage.config for stage in plan.stages[1:5])
    assert isinstance(first, GrpoConfig)
    assert isinstance(reset, DistillConfig)
    assert isinstance(on, GrpoConfig)
    assert isinstance(distilled, DistillConfig)
    assert reset.init_from == str(climbed / "self" / "final")
    assert ClimbPlan(make(tmp_path / "x", RESET, *changes)).stages[2].config.init_from == first.init_from
    assert [(source.run, source.steps) for source in reset.traces] == [(str(first.folder), (0, 2))]
    assert (on.init_from, on.steps) == (str(reset.folder / "final"), 2)
    assert on.optimizer.learning_rate == 1e-3 != first.optimizer.learning_rate
    assert distilled.traces[0].run == str(on.folder)
    last, checkpoint = plan.stages[-1], tmp_path / "x" / "first" / "checkpoints" / "step-00000002"
    assert last.parents == (checkpoint,)
    assert require_own(last.folder.final, allow_third_party=False).parents[0].id == read_lineage(checkpoint).id
    page = (tmp_path / "x" / "report" / "summary.md").read_text()
    assert "**first** collapsed after step 3: solved" in page
    assert "answers the collapse of first" in plan.text()
    assert "first (step-00000002)" in plan.text()
    assert run_climb(config) == 0


def test_what_did_not_collapse_is_not_rolled_back(climbed: Path, make: Make) -> None:
    with pytest.raises(RunError, match="stage first is to be rolled back, but it did not collapse"):
        ClimbPlan(make(climbed, "stages.3.init_from=null", "stages.3.rollback_of=first"))


def test_a_collapse_too_many_ends_the_climb(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collapse(monkeypatch)
    config = make(tmp_path / "x")
    for _ in range(2):
        with pytest.raises(RunError, match=r"stage first: collapsed after step 3.*Set `reset`"):
            run_climb(config)
    assert not (tmp_path / "x" / "self").exists()


def launch(folder: Path, config: ClimbConfig, faults: list[tuple[str, str, int, int]]) -> None:
    """As two workers under the launcher, to the end; every fault must have struck. Only `begin` is before any step, so
    that the launcher has to see the steps of a later stage as new ones, though their numbers are lower."""
    folder.mkdir(parents=True)
    save_config(config, folder / "climb.yaml")
    environment = os.environ | {"FAULTS": json.dumps(faults), "MARKS": str(folder), "OMP_NUM_THREADS": "1"}
    script = HERE / "faulty_climb.py" if faults else ROOT / "scripts" / "climb.py"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "launch.py"),
        "--nproc=2",
        "--restarts=100",
        "--fruitless-restarts=1",
    ]
    ended = subprocess.run(
        [*command, str(script), str(folder / "climb.yaml")], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(list(folder.glob("struck-*"))) == len(faults)


@pytest.mark.slow
def test_two_workers_killed_on_the_way_end_in_the_same_weights(make: Make, tmp_path: Path) -> None:
    launch(tmp_path / "a", make(tmp_path / "undisturbed"), [])
    faults = [("end", "pretrain", 5, 0), ("begin", "first", 0, 0), ("step", "first", 3, 1), ("step", "self", 2, 0)]
    launch(tmp_path / "b", make(tmp_path / "killed"), faults)
    assert trace(tmp_path / "killed") == trace(tmp_path / "undisturbed")
    assert account_of(tmp_path / "killed" / "first").attempts == 2  # `begin` came before its first


@pytest.mark.slow
def test_two_workers_killed_in_every_stage_of_the_tiny_climb(tmp_path: Path) -> None:
    def config(name: str) -> ClimbConfig:
        return load_config(ClimbConfig, CONFIGS / "tiny-climb.yaml", [f"output_dir={tmp_path / name}"])

    launch(tmp_path / "a", config("undisturbed"), [])
    stages = [stage.name for stage in ClimbPlan(config("undisturbed")).stages]
    launch(tmp_path / "b", config("killed"), [("step", name, 3, number % 2) for number, name in enumerate(stages)])
    assert trace(tmp_path / "killed") == trace(tmp_path / "undisturbed")
    assert len(trace(tmp_path / "killed")) == len(stages)
