"""The whole loop on configs/tiny.yaml: what it leaves, what it repeats, what it refuses, and how it stops."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checksums import sha256_of
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.errors import RunError, UsageError
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.checkpoint import Checkpointer, CheckpointReader
from mai_thinking.training.evaluation import evaluate_texts
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model_and_tokenizer
from mai_thinking.training.trainer import Trainer

SCRIPTS = Path(__file__).parents[1] / "scripts"
TIMINGS = {"tokens_per_second", "seconds", "data_wait"}
Make = Callable[..., PretrainConfig]


def untimed(folder: Path) -> list[str]:
    """metrics.jsonl, line by line and digit for digit, without what a clock says."""
    records = read_records(folder / "metrics.jsonl")
    return [json.dumps({name: value for name, value in r.items() if name not in TIMINGS}) for r in records]


def last_state(folder: Path) -> dict[str, Any]:
    reader = CheckpointReader(sorted((folder / "checkpoints").glob("step-*"))[-1])
    return {name: reader.read(name) for name in ("model", "optimizer", "loader", "progress")} | {
        "random": reader.read("random", of_rank=0)
    }


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, name: signal.Signals = signal.SIGTERM) -> None:
    """The signal reaches this process while step `step` is computed."""
    take_step = Trainer.take_step

    def with_signal(self: Trainer) -> None:
        if self.step + 1 == step:
            os.kill(os.getpid(), name)
        take_step(self)

    monkeypatch.setattr(Trainer, "take_step", with_signal)


def test_it_learns_and_leaves_what_it_promises(tiny_run: Path) -> None:
    steps = [r for r in read_records(tiny_run / "metrics.jsonl") if "kind" not in r]
    assert [r["step"] for r in steps] == list(range(1, 21))
    assert steps[0]["loss"] == pytest.approx(math.log(512), abs=0.3)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert {"tokens", "grad_norm", "lr", "tokens_per_second", "violation", "dead_experts", "router_entropy"} <= set(
        steps[0]
    )
    evaluations = [r for r in read_records(tiny_run / "metrics.jsonl") if r.get("kind") == "evaluation"]
    assert [r["step"] for r in evaluations] == [10, 20]
    assert evaluations[1]["bits_per_byte"] < evaluations[0]["bits_per_byte"] < 8
    summary = (tiny_run / "report" / "summary.md").read_text()
    assert "xz -9e" in summary
    for figure in ("loss", "bits_per_byte", "expert_load"):
        assert (tiny_run / "report" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({figure}.png)" in summary


class LostTracker:
    """Its service goes away after two steps, and is not there at the end either."""

    name = "lost"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.steps.append(step)
        if step > 2:
            raise ConnectionError("503\nService unavailable")

    def finish(self) -> None:
        raise ConnectionError("503")


def test_a_tracker_that_fails_costs_no_step(
    tiny_run: Path, tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tracker = LostTracker()
    monkeypatch.setattr(
        "accelerate.Accelerator.init_trackers", lambda self, *names, **settings: self.trackers.append(tracker)
    )
    assert pretrain(tiny_config(tmp_path / "run", "tracking.trackers=[tensorboard]")) == 0
    assert untimed(tmp_path / "run") == untimed(tiny_run)
    assert tracker.steps == [1, 2, 3]
    told = [line for line in capsys.readouterr().out.splitlines() if "lost failed" in line]
    assert told == ["tracking.trackers: lost failed and is left out from now on: 503 Service unavailable"]


def test_a_tracker_that_cannot_start_is_told_in_a_line(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, *names: object, **settings: object) -> None:
        raise RuntimeError("no account\nlog in first")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    with pytest.raises(UsageError, match=r"^tracking\.trackers: [^\n]*no account[^\n]*$"):
        pretrain(tiny_config(tmp_path / "run", "tracking.trackers=[tensorboard]"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"hidden_size": "x"}'),
        ("model.safetensors", b""),
        ("tokenizer.json", b"\xff"),
    ],
)
def test_a_damaged_model_folder_is_told_in_a_line(tiny_run: Path, tmp_path: Path, file: str, content: bytes) -> None:
    shutil.copytree(tiny_run / "final", tmp_path / "final")
    (tmp_path / "final" / file).write_bytes(content)
    with pytest.raises(UsageError, match=r"^\S*final: [^\n]*$"):
        load_model_and_tokenizer(tmp_path / "final")


def test_final_is_a_hugging_face_folder(tiny_run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_run / "final")
    for name, value in last_state(tiny_run)["model"].items():
        assert torch.equal(model.state_dict()[name], value), name
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "final")
    inputs = tokenizer(["The interpreter", "def"], return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 30 or (output == tokenizer.eos_token_id).any()
    alone = model.generate(**tokenizer("def", return_tensors="pt"), max_new_tokens=10, do_sample=False)
    assert tokenizer.decode(output[1], skip_special_tokens=True).startswith(
        tokenizer.decode(alone[0], skip_special_tokens=True)
    )


def test_one_seed_gives_the_same_digits_and_another_others(tiny_run: Path, tmp_path: Path, tiny_config: Make) -> None:
    assert pretrain(tiny_config(tmp_path / "again")) == 0
    assert untimed(tmp_path / "again") == untimed(tiny_run)
    assert pretrain(tiny_config(tmp_path / "other", "seed=1")) == 0
    assert untimed(tmp_path / "other") != untimed(tiny_run)


@pytest.mark.parametrize(("step", "name"), [(3, signal.SIGHUP), (10, signal.SIGTERM)])
def test_stopped_and_gone_on_with_is_the_same_run(
    tiny_run: Path,
    tmp_path: Path,
    tiny_config: Make,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    name: signal.Signals,
) -> None:
    """Dropout is on, so the generators matter; step 10 has an evaluation and a checkpoint of its own."""
    config = tiny_config(tmp_path / "run")
    inherited = signal.signal(name, signal.SIG_DFL)  # under nohup these tests would ignore a lost terminal
    try:
        with monkeypatch.context() as patch:
            stop_at(step, patch, name)
            assert pretrain(config) == 75
    finally:
        signal.signal(name, inherited)
    assert not (tmp_path / "run" / "final").exists()
    assert pretrain(config) == 0
    assert untimed(tmp_path / "run") == untimed(tiny_run)
    again, before = last_state(tmp_path / "run"), last_state(tiny_run)
    assert {name: sha256_of(part) for name, part in again.items()} == {
        name: sha256_of(part) for name, part in before.items()
    }


def test_more_accumulation_after_a_stop(
    tiny_run: Path, tmp_path: Path, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a run that died of memory."""
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert pretrain(tiny_config(tmp_path / "run")) == 75
    less = ["batch.micro_batch_size=1", "execution.activation_checkpointing=true", "evaluation.every=7"]
    assert pretrain(tiny_config(tmp_path / "run", *less)) == 0
    losses = [
        [r["loss"] for r in read_records(f / "metrics.jsonl") if "loss" in r] for f in (tmp_path / "run", tiny_run)
    ]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_what_decides_is_what_the_data_are_not_where(
    tmp_path: Path, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(json.dumps({"text": f"The {n}th line of {n * n} words is here. " * 9}) for n in range(90))
    source = "{name: mine, kind: jsonl, category: general, licence: MIT, provenance: human, weight: 1"
    config = {}
    for name, content in (("old", text), ("moved", text), ("other", text.replace("here", "gone"))):
        (tmp_path / f"{name}.jsonl").write_text(content + "\n")
        sources = f"data.sources=[{source}, path: {tmp_path / name}.jsonl}}]"
        config[name] = tiny_config(tmp_path / "run", sources, "steps=4", "schedule.warmup_steps=2")
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        assert pretrain(config["old"]) == 75
    with pytest.raises(UsageError):
        pretrain(config["other"])
    assert pretrain(config["moved"]) == 0


def test_a_last_checkpoint_out_of_turn_is_at_the_last_step(tmp_path: Path, tiny_config: Make) -> None:
    """Reading a batch ahead of the end would leave the data one step further than the weights."""
    config = tiny_config(tmp_path / "run", "steps=7", "checkpoint.every=3")
    assert pretrain(config) == 0
    state = last_state(tmp_path / "run")
    assert state["progress"]["step"] == 7
    assert sum(state["loader"]["rows"].values()) == 7 * config.batch.global_batch_size


def strike_last_evaluation(
    folder: Path, category: int, strike: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """`strike` once, as that many of its categories were begun; returns a list that has an entry for each beginning."""
    evaluate, begun = evaluate_texts, list[int]()

    def struck(model: Any, tokenizer: Any, texts: Any, **settings: Any) -> Any:
        if (folder / "checkpoints" / "step-00000020").exists():  # after the last step
            begun.append(len(texts))
            if len(begun) == category:
                strike()
        return evaluate(model, tokenizer, texts, **settings)

    monkeypatch.setattr("mai_thinking.training.evaluation.evaluate_texts", struck)
    return begun


def test_the_last_evaluation_goes_on_where_it_was(
    tiny_run: Path, tmp_path: Path, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    evaluated = strike_last_evaluation(tmp_path / "run", 2, die, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny_config(tmp_path / "run"))
    assert pretrain(tiny_config(tmp_path / "run")) == 0
    assert len(evaluated) == 3  # two categories, of which only the second was tried twice
    assert untimed(tmp_path / "run") == untimed(tiny_run)


def test_the_last_evaluation_can_be_stopped(
    tiny_run: Path, tmp_path: Path, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is saved by then: nobody who asks it to stop should have to wait for the rest."""
    evaluated = strike_last_evaluation(tmp_path / "run", 1, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    assert pretrain(tiny_config(tmp_path / "run")) == 75
    assert len(evaluated) == 1
    assert pretrain(tiny_config(tmp_path / "run")) == 0
    assert len(evaluated) == 2
    assert untimed(tmp_path / "run") == untimed(tiny_run)


def test_weights_that_no_checkpoint_filled_are_not_trained(
    tmp_path: Path, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on draws none; if its checkpoints go just then, it must not take what the memory held."""
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert pretrain(tiny_config(tmp_path / "run")) == 75
    monkeypatch.setattr(Checkpointer, "load_latest", lambda self, state: None)
    with pytest.raises(RunError, match="checkpoints have gone"):
        pretrain(tiny_config(tmp_path / "run"))


def test_sharded_by_one_rank_is_the_same_run(tiny_run: Path, tmp_path: Path, tiny_config: Make) -> None:
    assert pretrain(tiny_config(tmp_path / "run", "execution.parallel=fsdp")) == 0
    assert untimed(tmp_path / "run") == untimed(tiny_run)


def test_a_finished_run_is_left_alone(tiny_run: Path, tiny_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    assert pretrain(tiny_config(tiny_run)) == 0
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


def test_a_folder_of_another_config_is_refused(tiny_run: Path, tmp_path: Path, tiny_config: Make) -> None:
    with pytest.raises(UsageError, match=r"belongs to a run with another config \(optimizer\.learning_rate differ"):
        pretrain(tiny_config(tiny_run, "optimizer.learning_rate=0.1"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds files but no config\.yaml"):
        pretrain(tiny_config(tmp_path))


def test_mid_training_starts_from_a_model_folder(tiny_run: Path, tmp_path: Path, tiny_config: Make) -> None:
    final = tiny_run / "final"
    longer = ["batch.context_length=128", "batch.global_batch_size=4", "steps=5"]
    stage = [f"init_from={final}", f"data.tokenizer.path={final}", *longer]
    assert pretrain(tiny_config(tmp_path / "mid", *stage)) == 0
    first = read_records(tmp_path / "mid" / "metrics.jsonl")[0]
    last = [r for r in read_records(tiny_run / "metrics.jsonl") if "kind" not in r][-1]
    assert first["loss"] == pytest.approx(last["loss"], abs=0.7)
    assert load_model_and_tokenizer(tmp_path / "mid")[0].config.max_position_embeddings == 128


def test_a_run_under_way_is_sampled_from_its_newest_whole_checkpoint(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its newest is torn, another is being written; an older one is whole."""
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    checkpoints = tmp_path / "run" / "checkpoints"
    *_, older, newest = sorted(checkpoints.glob("step-*"))
    (checkpoints / "step-00000099.tmp").mkdir()
    (weights,) = newest.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    model, _ = load_model_and_tokenizer(tmp_path / "run")
    saved = CheckpointReader(older).read("model")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    told = capsys.readouterr().err
    assert f"{newest}: {weights.name} has" in told
    assert told.count("an older checkpoint is taken") == 1
    for path in set(checkpoints.glob("step-*")) - {newest}:
        shutil.rmtree(path)
    with pytest.raises(UsageError, match="no model here"):
        load_model_and_tokenizer(tmp_path / "run")
