"""Stores of traces, as an RL run leaves them, and configs of distillations from them."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.loading import load_config
from mai_thinking.data.tokenizer import load_tokenizer
from mai_thinking.provenance.lineage import record_traces, require_own
from mai_thinking.rl.traces import Trace, TraceStore

CONFIG = Path(__file__).parents[2] / "configs" / "tiny-distill.yaml"


@pytest.fixture(scope="module")
def tokenizer(tiny_run: Path) -> Any:
    return load_tokenizer(tiny_run / "final")


@pytest.fixture
def trace(tokenizer: Any) -> Callable[..., Trace]:
    """`trace(number, prompt=…, response=…, …)`: a right, finished trace in the frame of the exercises, or another."""

    def make(number: int, *, question: str = "", response: str = "Answer: 3\n", **changes: Any) -> Trace:
        prompt = f"Question: {question or f'What is {number} less {number} and 3?'}\n"
        end = [tokenizer.eos_token_id] if changes.get("finished", True) else []
        fields: dict[str, Any] = {
            "step": 0, "engine_version": 0, "request_id": number, "group_id": number, "task": "sum",
            "problem_id": prompt, "prompt": prompt,
            "prompt_ids": [tokenizer.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)],
            "response": response, "response_ids": [*tokenizer.encode(response, add_special_tokens=False), *end],
            "logprobs": [], "finished": True, "answer": "3", "reference": "3", "reward": 1.0, "passed": True,
            "reward_task": 1.0,
            "reward_language": 0.0, "reward_length": 0.0, "reward_calls": 0.0, "reward_waste": 0.0,
            "pass_rate": 0.5, "verdict": "kept", "checkpoint": "x",
            "lineage": "y",
        }  # fmt: skip
        return Trace(**(fields | changes))

    return make


@pytest.fixture
def store(tiny_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """`store(traces, name)`: the folder of an RL run that left them, one wave a step, with a record."""

    def make(traces: Iterable[Trace], name: str = "climb") -> Path:
        run = tmp_path / name
        by_step: dict[int, list[Trace]] = {}
        for one in traces:
            by_step.setdefault(one["step"], []).append(one)
        for step, wave in by_step.items():
            TraceStore(run / "traces").append(step, wave)
        shutil.copytree(tiny_run / "final", run / "architecture")
        (run / "config.yaml").write_text("template: {preset: exercise}\n")
        parent = require_own(tiny_run / "final", allow_third_party=False)
        record_traces(run / "traces", parent=parent, config=run / "config.yaml", seed=0)
        return run

    return make


@pytest.fixture
def make(tiny_run: Path, tmp_path: Path) -> Callable[..., DistillConfig]:
    """`make([run, …], "key=value", …)`: configs/tiny-distill.yaml on all traces of these runs, with all rules."""

    def config(runs: list[Path], *overrides: str) -> DistillConfig:
        sources = [f"{{run: {run}, late: 1.0}}" for run in runs]
        places = [f"output_dir={tmp_path / 'run'}", f"init_from={tiny_run / 'final'}", "selection={}"]
        return load_config(DistillConfig, CONFIG, [*places, f"traces=[{', '.join(sources)}]", *overrides])

    return config


@pytest.fixture
def with_text(tiny_config: Callable[..., Any]) -> Callable[[float], str]:
    """`with_text(share)`: an override that mixes in so much of tiny's text."""
    data = tiny_config(Path("unused")).data.model_dump(mode="json")
    del data["tokenizer"]
    return lambda share: f"text={json.dumps({'share': share, 'data': data})}"
