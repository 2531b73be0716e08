"""A whole run from start to end, and mistakes in its config."""

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from checksums import sha256_of
from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.loading import validate
from mai_thinking.errors import RunError, UsageError
from mai_thinking.provenance.lineage import record_traces, require_own
from mai_thinking.recipes.distill import self_distill
from mai_thinking.report import write_summary
from mai_thinking.report.lineage import report
from mai_thinking.rl.rollout import Rollout
from mai_thinking.rl.trace_packing import IGNORED, trace_row
from mai_thinking.rl.trace_selection import select
from mai_thinking.rl.traces import Trace, TraceStore
from mai_thinking.training.checkpoint import CheckpointReader
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model
from mai_thinking.training.trainer import Trainer

TIMINGS = {"tokens_per_second", "seconds"}


def lessons(trace: Callable[..., Trace]) -> list[Trace]:
    """Right answers that a tiny model can tell by the question's last word, and wrong ones."""
    animals = ("cat", "dog", "hen", "cow")
    return [
        trace(
            number,
            question=f"Is it {number}, or a {animals[number % 4]}",
            response=f"Answer: {animals[(number + wrong) % 4]}\n",
            answer=animals[(number + wrong) % 4],
            passed=not wrong,
            step=number % 3,
        )
        for number in range(120)
        for wrong in (number % 2,)
    ]


def loglikelihood(model: Any, examples: Iterable[Rollout]) -> float:
    model.eval()
    total = 0.0
    with torch.no_grad():
        for example in examples:
            row = trace_row([example], example.places)
            logits = model(input_ids=row["input_ids"][None]).logits[0].log_softmax(-1)
            kept = row["labels"] != IGNORED
            total += float(logits[kept].gather(1, row["labels"][kept][:, None]).sum())
    return total


def test_it_learns_and_says_where_it_comes_from(
    make: Callable[..., DistillConfig],
    store: Callable[..., Path],
    trace: Callable[..., Trace],
    tokenizer: Any,
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    runs = [store(lessons(trace)[:80], "a"), store([t | {"step": 0} for t in lessons(trace)[80:]], "b")]
    config = make(runs, "steps=30", "optimizer.learning_rate=5e-3", "checkpoint.every=10")
    assert self_distill(config) == 0
    losses = [record["loss"] for record in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 30
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    examples = [example for source in select(config, tokenizer).sources for example in source.examples]
    before, after = (loglikelihood(load_model(f / "final"), examples) for f in (tiny_run, tmp_path / "run"))
    assert after > 0.5 * before
    assert load_model(tmp_path / "run" / "final").config.dropout == 0.15

    lineage = require_own(tmp_path / "run" / "final", allow_third_party=False)
    wanted = [require_own(f, allow_third_party=False).id for f in (tiny_run / "final", *(r / "traces" for r in runs))]
    assert list(lineage.record.parents) == wanted
    assert [parent.record.kind for parent in lineage.parents] == ["model", "traces", "traces"]
    assert report(tmp_path / "run", Console(quiet=True))
    write_summary(tmp_path / "run")
    page = (tmp_path / "run" / "report" / "summary.md").read_text()
    assert "| removed: wrong | 40 | 20 |" in page
    assert self_distill(config) == 0  # nothing more to do


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    reader = CheckpointReader(sorted((folder / "checkpoints").glob("step-*"))[-1])
    state = {name: reader.read(name) for name in ("model", "optimizer", "batches", "progress")}
    state["random"] = reader.read("random", of_rank=0)
    records = read_records(folder / "metrics.jsonl")
    return {
        "metrics": [{name: value for name, value in r.items() if name not in TIMINGS} for r in records],
        "state": {name: sha256_of(value) for name, value in state.items()},
        "final": sha256_of(load_model(folder / "final").state_dict()),
    }


@pytest.fixture
def interrupted(
    make: Callable[..., DistillConfig],
    store: Callable[..., Path],
    trace: Callable[..., Trace],
    with_text: Callable[[float], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[DistillConfig, DistillConfig]:
    """Two configs alike but for their folders; the second's run was stopped by SIGTERM after step 3 of 6."""
    run = store(lessons(trace))
    options = ["steps=6", with_text(0.25)]
    undisturbed, config = (make([run], *options, f"output_dir={tmp_path / name}") for name in ("undisturbed", "run"))
    take_step = Trainer.take_step

    def with_signal(self: Trainer) -> None:
        if self.step + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", with_signal)
        assert self_distill(config) == 75
    assert not (tmp_path / "run" / "final").exists()
    assert self_distill(undisturbed) == 0
    return undisturbed, config


def test_stopped_and_gone_on_with_is_the_same_run(interrupted: tuple[DistillConfig, DistillConfig]) -> None:
    undisturbed, config = interrupted
    assert self_distill(config) == 0
    assert outcome(config.folder) == outcome(undisturbed.folder)


@pytest.mark.parametrize("omitted", ["batches", "random", "optimizer"])
def test_a_checkpoint_without_a_part_of_the_state_is_found_out(
    interrupted: tuple[DistillConfig, DistillConfig], monkeypatch: pytest.MonkeyPatch, omitted: str
) -> None:
    """The negative control: what is not restored on resumption shows."""
    _, config = interrupted
    state = Trainer.state
    monkeypatch.setattr(Trainer, "state", lambda self: {k: v for k, v in state(self).items() if k != omitted})
    assert self_distill(config) == 0
    losses = [[r["loss"] for r in read_records(c.folder / "metrics.jsonl")] for c in interrupted]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0] != losses[1]


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["traces.0.run=runs/nowhere"], "no traces here; `python scripts/grpo.py` makes them"),
        (["traces.0.run=runs/nano-grpo"], "`python scripts/grpo.py configs/nano-grpo.yaml` makes them"),
        (["init_from=runs/nano"], "no model here"),
        (["traces=[]"], "traces"),
        (["traces.0.steps=[5, 2]"], "is not .least, most."),
        (["traces.0.steps=[50, 60]"], "no traces from steps 50 to 60; there are some from 0 to 2"),
        (["selection.patterns={every: Answer}"], "nothing is left of 120 .* fell 60 to 'wrong', 60 to 'hack every'"),
        (["selection.patterns={open: '('}"], "open: '\\(' is not a regular expression"),
        (["selection.hacks=[sloth]"], "several-answers"),
        (["selection.per_promt=2"], "did you mean 'per_prompt'"),
        (["reframe={template: {prompt: none}}"], "question"),
        (["text={share: 1.0}"], "text.share"),
        (["text={share: 0.5, data: {tokenizer: {path: x}}}"], "remove the key"),
        (["schedule.warmup_steps=9"], "more than the 8 steps"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    make: Callable[..., DistillConfig],
    store: Callable[..., Path],
    trace: Callable[..., Trace],
    tmp_path: Path,
    overrides: list[str],
    message: str,
) -> None:
    run = store(lessons(trace))
    with pytest.raises(UsageError, match=message) as caught:
        self_distill(make([run], *overrides))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_traces_of_unknown_origin_are_refused(
    make: Callable[..., DistillConfig], store: Callable[..., Path], trace: Callable[..., Trace]
) -> None:
    run = store(lessons(trace))
    (run / "traces" / "lineage.json").unlink()
    with pytest.raises(UsageError, match="nothing from elsewhere is built on"):
        self_distill(make([run]))


def test_a_store_that_grew_in_the_middle_of_a_run_is_told(
    interrupted: tuple[DistillConfig, DistillConfig], trace: Callable[..., Trace], tiny_run: Path
) -> None:
    run = interrupted[1].traces[0].folder
    TraceStore(run / "traces").append(3, [trace(999, step=3)])
    parent = require_own(tiny_run / "final", allow_third_party=False)
    record_traces(run / "traces", parent=parent, config=run / "config.yaml", seed=0)
    with pytest.raises((UsageError, RunError), match="other traces now than when this run began"):
        self_distill(interrupted[1])


def test_a_dry_run_shows_what_is_removed_and_writes_nothing(
    make: Callable[..., DistillConfig],
    store: Callable[..., Path],
    trace: Callable[..., Trace],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert self_distill(make([store(lessons(trace))]), dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "| removed: wrong | 60 |" in printed
    assert "| **taken** | **60** |" in printed
    assert not (tmp_path / "run").exists()


def test_the_defaults_are_the_reports() -> None:
    smallest = {"name": "x", "steps": 1000, "init_from": "y", "traces": [{"run": "z"}]}
    batch = {"context_length": 64, "global_batch_size": 4, "micro_batch_size": 2}
    config = validate(DistillConfig, smallest | {"batch": batch, "optimizer": {"clip_norm": 0.5}}, "x")
    optimizer = config.optimizer
    assert (config.dropout, config.balance, config.schedule.warmup_steps) == (0.15, 1e-2, 20)
    decays = {optimizer.weight_decay, optimizer.weight_decay_attention, optimizer.weight_decay_embeddings}
    assert (optimizer.learning_rate, decays, optimizer.clip_norm) == (1.7e-5, {0.001}, 0.5)
    assert optimizer.learning_rate * config.schedule.floor == pytest.approx(5.2e-6)
