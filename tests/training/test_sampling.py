"""Looking at a model while it learns: how soon, how often, what it costs, and that it changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.report import conclude
from mai_thinking.training.context import ProgressLine
from mai_thinking.training.evaluation import SHARE, SMALLEST, affordable
from mai_thinking.training.metrics import read_records
from mai_thinking.training.sampling import GLANCES, Glance, sample_texts

NANO = Path(__file__).parents[2] / "configs" / "nano.yaml"


@pytest.mark.parametrize(("first", "cost", "most"), [(10, 0.4, 12), (10, 3.0, 9), (10, 60.0, 4), (600, 0.4, 4)])
def test_looks_come_soon_and_take_no_more_than_their_share(first: float, cost: float, most: int) -> None:
    """Two hours of steps of half a second; only the first look is made without knowing what it costs."""
    now, looks = 0.0, []
    glance = Glance(first, lambda: now)
    while now < 7200:
        if glance.due():
            looks.append(now)
            with glance.looking():
                now += cost
        now += 0.5
    assert looks[0] == first
    assert 3 <= len(looks) <= most
    assert all(cost * (i + 1) <= GLANCES * (at - cost * i) for i, at in enumerate(looks) if i)


def test_the_time_left_counts_all_that_lies_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    line = ProgressLine(990, 10.0, show=True)
    line.after_last = 10  # the last evaluation
    for step in range(1, 401):
        now += 20 if step == 1 else 0.5  # what is made once, at the first
        now += 30 if step == 395 else 0  # an evaluation
        line.update(step, 100 * step, 1.0)
    seconds = 600 * (399 * 0.5 + 30) / 399
    assert f"0:0{int(seconds) // 60}:{round(seconds) % 60:02} left" in line.text
    assert f"{49 * 100 / (49 * 0.5 + 30):,.0f} tokens/s" in line.text


def test_what_a_model_writes_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLine(1, 10.0, show=True).log("a\x1b[2Jb\r\n  c")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\r\n  c\n"


def test_looking_at_every_step_changes_no_bit(
    tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Glance, "due", lambda self: True)
    assert pretrain(tiny_config(tmp_path / "run", "model.dropout=0.1", "steps=8", "name=seen")) == 0
    told = capsys.readouterr().out
    monkeypatch.undo()
    assert pretrain(tiny_config(tmp_path / "unseen", "model.dropout=0.1", "steps=8", "name=seen")) == 0
    assert told.count("; it writes\n  │ def ") == 3  # three prompts in turn
    assert "it writes" not in capsys.readouterr().out
    for name in ("final/model.safetensors", "checkpoints/step-00000008/rank-00000.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "unseen" / name).read_bytes()


def test_every_token_can_be_drawn(tiny_run: Path) -> None:
    """Not the likeliest fifty alone, which is what the library takes where nothing is said."""
    final = tiny_run / "final"
    model, tokenizer = MaiThinkingForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    model.lm_head.weight.data.mul_(1e-3)  # about as likely as each other
    drawn = sample_texts(model, tokenizer, "a", tokens=1, samples=300, temperature=1.0, top_p=1.0)
    assert len(set(drawn)) > 100


def test_an_evaluation_reads_what_it_can_afford() -> None:
    config = load_config(PretrainConfig, NANO)
    between = config.evaluation.every * config.batch.tokens_per_step
    assert config.evaluation.max_bytes is not None
    assert affordable(between, 4) >= config.evaluation.max_bytes  # the quick start's own interval costs no byte
    assert affordable(between // 4, 4) < config.evaluation.max_bytes
    assert affordable(1, 4) == SMALLEST
    # At least a forward pass over three bytes a token, each read twice: 2/3 of what a step takes.
    assert 4 * affordable(between, 4) / 3 * 2 / 3 < 1.2 * SHARE * between


def test_a_run_on_code_tells_how_much_of_what_it_writes_parses(
    tiny_config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"def f{n}(x):\n    return x + {n}\n\n\n" * 5 for n in range(200)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = f"{{name: mine, kind: jsonl, path: {tmp_path / 'code.jsonl'}, category: code, licence: MIT"
    data = [f"data.sources=[{source}, provenance: human, weight: 1}}]", "data.cleaning.near_duplicates=null"]
    config = tiny_config(tmp_path / "run", *data, "steps=40", "evaluation.every=20", "evaluation.sample_prompts=[]")
    assert conclude(pretrain(config), config.folder) == 0
    first, last = (r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r.get("kind") == "evaluation")
    assert "parsed" not in first  # so short an interval pays for no such sample
    assert 0 < last["parsed"] <= 1
    told = f"{round(32 * last['parsed'])} of 32 functions that it wrote parse"
    assert told in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "report" / "summary.json").read_text())["parsed"] == last["parsed"]
