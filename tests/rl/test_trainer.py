"""The whole climb on configs/tiny-grpo.yaml: what it leaves, how it resumes, how it is cut, what it refuses."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checksums import sha256_of
from mai_thinking.config.grpo import GrpoConfig, ObjectiveSection, RolloutSection
from mai_thinking.config.loading import load_config, save_config
from mai_thinking.errors import RunError, UsageError
from mai_thinking.launch.goodput import account_of
from mai_thinking.provenance.lineage import require_own
from mai_thinking.recipes.grpo import grpo
from mai_thinking.report import conclude
from mai_thinking.rl.collector import Collector
from mai_thinking.rl.engine import BatchedEngine
from mai_thinking.rl.packing import pack
from mai_thinking.rl.policy import PolicyLoss
from mai_thinking.rl.policy_model import check_lengths
from mai_thinking.rl.rollout import Group, Rollout
from mai_thinking.rl.rollout_worker import RolloutWorker
from mai_thinking.rl.tasks import Grade, TaskSampler
from mai_thinking.rl.traces import FOLDER, TraceStore
from mai_thinking.training.checkpoint import CheckpointReader
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model
from mai_thinking.training.trainer import Trainer
from ranks import run_ranks, start_script
from tiny_models import tiny_learner, tiny_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = ROOT / "configs" / "tiny-grpo.yaml"
TIMINGS = {"tokens_per_second", "seconds", "rollout_seconds"}
Make = Callable[..., GrpoConfig]


@pytest.fixture(scope="module")
def make(tiny_run: Path) -> Make:
    """`make(folder, "key=value", …)`: configs/tiny-grpo.yaml from the tiny base."""

    def config(folder: Path, *overrides: str) -> GrpoConfig:
        return load_config(GrpoConfig, CONFIG, [f"output_dir={folder}", f"init_from={tiny_run / 'final'}", *overrides])

    return config


@pytest.fixture(scope="module")
def climbed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished, undisturbed climb."""
    folder = tmp_path_factory.mktemp("climb") / "run"
    assert conclude(grpo(make(folder)), folder) == 0
    return folder


def trace(folder: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    records = read_records(folder / "metrics.jsonl")
    reader = CheckpointReader(sorted((folder / "checkpoints").glob("step-*"))[-1])
    names = ("model", "optimizer", "objective", "curriculum", "progress")
    own = {name: reader.read(name, of_rank=0) for name in ("collector", "random")}
    return {
        "metrics": [json.dumps({k: v for k, v in record.items() if k not in TIMINGS}) for record in records],
        "state": {name: sha256_of(value) for name, value in ({n: reader.read(n) for n in names} | own).items()},
        "traces": TraceStore(folder / FOLDER).read().to_pylist(),
        "final": sha256_of(load_model(folder / "final").state_dict()),
    }


def test_it_climbs(make: Make, tmp_path: Path) -> None:
    """Half of the grade is for the first letter of the last word: within reach of some steps. From five bases, which
    differ as the text of Python installations does, 36 steps gained .25 to .49; eighteen gained .09 to .28."""
    longer = ["steps=36", "curriculum.max_steps=100", "evaluation.every=36", "evaluation.problems=64"]
    assert grpo(make(tmp_path / "run", *longer)) == 0
    rates = [r["pass@1"] for r in read_records(tmp_path / "run" / "metrics.jsonl") if r.get("kind") == "evaluation"]
    assert rates[-1] > rates[0] + 0.1


def test_it_leaves_what_it_promises(climbed: Path, tiny_run: Path) -> None:
    records = read_records(climbed / "metrics.jsonl")
    steps = [record for record in records if "kind" not in record]
    assert [record["step"] for record in steps] == list(range(1, 7))
    promised = {
        "reward", "reward/task", "reward/language", "reward/length", "pass_rate", "entropy", "clip_relaxation",
        "clip_fraction", "outer_clip_fraction", "response_length", "staleness", "loss", "grad_norm", "lr",
    }  # fmt: skip
    assert promised <= set(steps[1])
    assert {"mismatch", "groups_kept"} <= set(steps[0])
    assert steps[0]["mismatch"] < 1e-4  # the engine and the learner have the same weights there
    assert steps[0]["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert [record["max_length"] for record in steps] == [8, 8, 8, 8, 16, 16]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    assert [record["step"] for record in evaluations] == [0, 3, 6]
    summary = (climbed / "report" / "summary.md").read_text()
    assert "pass@1 after" in summary
    assert " groups of 8 rollouts." in summary
    assert (climbed / "report" / "climb.png").read_bytes().startswith(b"\x89PNG")
    before, after = (load_model(folder / "final").state_dict() for folder in (tiny_run, climbed))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_every_rollout_is_in_the_store_and_in_the_lineage(climbed: Path) -> None:
    traces = TraceStore(climbed / FOLDER).read().to_pylist()
    assert len({trace["request_id"] for trace in traces}) == len(traces)
    kept = [trace for trace in traces if trace["verdict"] == "kept"]
    assert len(kept) >= 6 * 2 * 8
    for one in kept:
        assert one["reward"] == pytest.approx(
            one["reward_task"] + 0.5 * one["reward_language"] - (0.25 * one["reward_length"] if one["step"] < 4 else 0)
        )
    for folder in (climbed / "final", climbed / FOLDER):
        kinds = [record.kind for record in require_own(folder, allow_third_party=False).records.values()]
        assert kinds.count("random-weights") == 1
        assert kinds.count("model") >= 1


@pytest.mark.parametrize("step", [2, 3])
def test_stopped_and_gone_on_with_is_the_same_climb(
    climbed: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """After step 2 the buffer holds pending rollouts; after step 3 an evaluation and a new update follow."""
    take_step = Trainer.take_step

    def with_signal(self: Trainer) -> None:
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", with_signal)
        assert grpo(make(tmp_path / "run")) == 75
    assert grpo(make(tmp_path / "run")) == 0
    assert trace(tmp_path / "run") == trace(climbed)


def run_with_kills(folder: Path, config: GrpoConfig, faults: list[tuple[str, int, int]]) -> None:
    """Start again and again, as a launcher would, until the run is done; every fault must have struck."""
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    environment, script = {"FAULTS": json.dumps(faults), "MARKS": str(folder)}, HERE / "faulty_grpo.py"
    for _ in range(len(faults) + 1):
        process = start_script(script, str(folder / "config.yaml"), output=folder / "said", **environment)
        process.join(200)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (folder / "said").read_text()
    assert process.exitcode == 0
    assert len([path for path in folder.iterdir() if path.name.count("-") == 2]) == len(faults)


@pytest.fixture(scope="module")
def undisturbed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With one thread, as the killed ones run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_with_kills(folder / "job", make(folder / "run"), [])
    return trace(folder / "run")


def test_killed_in_generation_and_in_mid_buffer(undisturbed: dict[str, Any], make: Make, tmp_path: Path) -> None:
    faults = [("draw", 25, 0), ("trace", 1, 0), ("update", 2, 0), ("learn", 5, 0)]
    run_with_kills(tmp_path / "job", make(tmp_path / "run"), faults)
    assert trace(tmp_path / "run") == undisturbed
    assert account_of(tmp_path / "run").attempts == len(faults) + 1


@pytest.mark.parametrize("omitted", ["collector", "optimizer", "curriculum"])
def test_a_checkpoint_without_a_part_of_the_state_is_found_out(
    climbed: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, omitted: str
) -> None:
    """The negative control of the tests of resumption."""
    state, take_step = Trainer.state, Trainer.take_step

    def with_signal(self: Trainer) -> None:
        if self.step + 1 == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(self)

    monkeypatch.setattr(Trainer, "state", lambda self: {k: v for k, v in state(self).items() if k != omitted})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", with_signal)
        assert grpo(make(tmp_path / "run")) == 75
    try:
        assert grpo(make(tmp_path / "run")) == 0
    except (IndexError, RunError):
        return  # no rollouts where there should be some, or other ones than the first time
    assert read_losses(tmp_path / "run") != read_losses(climbed)


def test_a_climb_ends_when_its_tasks_are_solved(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the second filling on every response is right: then no group is left to learn from."""
    respond, fill, fillings = RolloutWorker.respond, Collector.fill, []

    def counted(self: Collector, *arguments: Any, **settings: Any) -> Any:
        fillings.append(self.next_batch)
        return fill(self, *arguments, **settings)

    def all_right(self: RolloutWorker, asked: Any, temperature: Any = None, **more: Any) -> Any:
        rollouts = respond(self, asked, temperature, **more)
        for rollout in rollouts if len(fillings) > 1 else ():
            rollout.grade = Grade(1.0, True)
        return rollouts

    monkeypatch.setattr(Collector, "fill", counted)
    monkeypatch.setattr(RolloutWorker, "respond", all_right)
    config = make(tmp_path / "run", "evaluation.every=2")
    assert grpo(config) == 0
    assert "the tasks are solved" in capsys.readouterr().out
    steps = [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl") if "kind" not in record]
    assert len(steps) == config.rollouts.steps_per_update < config.steps
    assert (tmp_path / "run" / "final").is_dir()


@pytest.mark.slow
def test_the_ranks_that_are_left_save_pending_rollouts_too(make: Make, tmp_path: Path) -> None:
    """Rank 1 dies in mid-buffer, before it updates; no checkpoint on a schedule is there yet."""
    runs = []
    for name, faults in (("whole", []), ("struck", [("update", 3, 1)])):
        folder = tmp_path / name
        folder.mkdir()
        config = make(folder / "run", "steps=4", "checkpoint.every=100", "evaluation.every=100")
        save_config(config, folder / "config.yaml")
        environment = os.environ | {"FAULTS": json.dumps(faults), "MARKS": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--nproc=2", "--jit-seconds=60"]
        command += [str(HERE / "faulty_grpo.py"), str(folder / "config.yaml")]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        runs.append(folder / "run")
    assert (tmp_path / "struck" / "update-3-1").exists()
    account = account_of(runs[1])
    assert (account.rescued, account.recomputed_steps) == (1, 0)
    records = [
        [{k: v for k, v in r.items() if k not in TIMINGS} for r in read_records(f / "metrics.jsonl")] for f in runs
    ]
    assert records[0] == records[1]
    first, second = (sha256_of(load_model(folder / "final").state_dict()) for folder in runs)
    assert first == second


def read_losses(folder: Path) -> list[tuple[float, int]]:
    steps = [record for record in read_records(folder / "metrics.jsonl") if "kind" not in record]
    return [(record["loss"], record["max_length"]) for record in steps]


@pytest.mark.slow
def test_killed_at_ten_random_points(undisturbed: dict[str, Any], make: Make, tmp_path: Path) -> None:
    draw = random.Random(7)
    faults = [("draw", number, 0) for number in draw.sample(range(2, 60), 4)]
    faults += [("trace", wave, 0) for wave in draw.sample(range(4), 2)]
    faults += [(place, draw.randint(2 * n + 1, 2 * n + 2), 0) for n, place in enumerate(("learn", "update", "learn"))]
    faults += [("update", 6, 0)]
    run_with_kills(tmp_path / "job", make(tmp_path / "run"), faults)
    assert trace(tmp_path / "run") == undisturbed


# ------------------------------------------------------------------------------------------- how a global batch is cut


def some_groups() -> list[Group]:
    """Four groups of four rollouts of uneven lengths, with advantages of both signs, from the tiny model itself."""
    model = tiny_model()
    engine = BatchedEngine(model, slots=16, temperature=1.0, top_p=0.97, seed=3, end_of_text=1)
    groups = []
    for number in range(4):
        prompt = [1, *range(10, 14 + number)]
        requests = [Rollout(4 * number + sample, prompt, 3 + 3 * sample) for sample in range(4)]
        advantages = (1.5, -0.5, 0.2 * number, -1.2)
        rollouts = [replace(one, advantage=a) for one, a in zip(engine.generate(requests), advantages, strict=True)]
        groups.append(Group(number, 0, "kept", rollouts))
    return groups


def gradients_of(groups: list[Group], rows: int, **execution: Any) -> dict[str, torch.Tensor]:
    """What one update hands to the optimiser."""
    model = tiny_model()
    with torch.no_grad():  # another policy than the engine's, so that ratios are not all 1
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    learner, gradients = tiny_learner(model, balance=0.5, **execution)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    advantages = [rollout.advantage for rollout in rollouts]
    experts = model.config.num_experts
    loss = PolicyLoss(ObjectiveSection(), RolloutSection(), advantages, clip_relaxation=0.0, num_experts=experts)
    learner.update(pack(rollouts, row_length=64, rows=rows, num_experts=experts), loss, 1)
    return gradients


def test_a_step_whose_advantages_are_all_zero_changes_no_weight() -> None:
    """Though the balance loss has a gradient, and decay and momentum would move weights without one."""
    silent = some_groups()
    for group in silent:
        for rollout in group.rollouts:
            rollout.advantage = 0.0
    assert gradients_of(silent, rows=8) == {}
    silent[-1].rollouts[1].advantage = 1.0
    assert gradients_of(silent, rows=8)


def rank_gradients(rank: int, world: int, execution: dict[str, Any]) -> dict[str, Any]:
    mine = some_groups()[rank::world]
    return {name: gradient.numpy() for name, gradient in gradients_of(mine, rows=1, **execution).items()}


def test_accumulation_and_ranks_do_not_change_the_gradients() -> None:
    whole = gradients_of(some_groups(), rows=8)
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-2
    for rows in (4, 2, 1):
        for name, gradient in gradients_of(some_groups(), rows=rows).items():
            torch.testing.assert_close(gradient, whole[name], atol=1e-6, rtol=1e-5, msg=f"{name}, {rows} rows")
    for result in run_ranks(2, rank_gradients, 2, {}):
        for name, gradient in result.items():
            torch.testing.assert_close(torch.from_numpy(gradient), whole[name], atol=1e-6, rtol=1e-5, msg=name)


def test_prompts_too_long_for_a_row_are_found_at_the_start(make: Make, tmp_path: Path) -> None:
    """Counted, told and left out, or refused by a key; and never met in mid-run."""
    questions = [f"What is {n} plus {n}?" for n in range(60)] + [f"What is {n}, {'and ' * 200}{n}?" for n in range(20)]
    lines = [json.dumps({"question": question, "answer": "1"}) for question in questions]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    tasks = f"tasks=[{{name: mine, kind: jsonl, path: {tmp_path / 'q.jsonl'}}}]"
    config = make(tmp_path / "run", tasks)
    mix = TaskSampler(config.tasks, seed=0)
    check_lengths(config, mix)
    (note,) = mix.notes
    assert note.startswith("20 of 80 prompts of task 'mine' leave no room in packing.row_length 96")
    assert f"({tmp_path / 'q.jsonl'}, line 71) has" in note
    drawn = [mix.problem("train", n) for n in range(300)] + mix.held_out("mine", 99)
    assert len(drawn) > 300
    assert not any("and and" in problem.question for problem in drawn)
    untouched = TaskSampler(config.tasks, seed=0)
    assert any("and and" in untouched.problem("train", n).question for n in range(300))
    fitting = [n for n in range(300) if "and and" not in untouched.problem("train", n).question]
    assert all(mix.problem("train", n) == untouched.problem("train", n) for n in fitting)
    with pytest.raises(UsageError, match="20 of 80 prompts"):
        check_lengths(make(tmp_path / "run", tasks, "packing.long_prompts=refuse"), untouched)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["packing.row_length=20"], "128 of 128 prompts of task 'largest' leave no room in packing.row_length 20"),
        (["tasks=[]"], "tasks"),
        (["rollouts.lead=9"], "max_staleness"),
        (["objective.epsilom=1"], "did you mean 'epsilon'"),
        (["init_from=nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(make: Make, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        grpo(make(tmp_path / "run", *overrides))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
