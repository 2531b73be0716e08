"""Self-distillation: which traces the rules choose, what a step learns from them, and a whole run from start to end."""

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from checksums import sha256_of
from mai_thinking.config.distillation import DistillConfig, ReframeSection
from mai_thinking.config.loading import load_config, validate
from mai_thinking.config.tasks import TemplateSection
from mai_thinking.data import prepare
from mai_thinking.data.tokenizer import load_tokenizer, train_tokenizer
from mai_thinking.distillation import SelfDistillation, self_distill
from mai_thinking.errors import RunError, UsageError
from mai_thinking.lineage import record_traces, require_own
from mai_thinking.lineage_report import report
from mai_thinking.rl.traces import Trace, TraceStore
from mai_thinking.trace_packing import IGNORED, Batches, trace_row
from mai_thinking.trace_selection import Example, Selection, move, select
from mai_thinking.training.checkpoint import CheckpointReader
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model
from mai_thinking.training.parallel import share
from mai_thinking.training.step import StepResult, TrainStep
from tiny_models import tiny_model

CONFIG = Path(__file__).parents[1] / "configs" / "tiny-distill.yaml"
TIMINGS = {"tokens_per_second", "seconds"}
Make = Callable[..., DistillConfig]
Store = Callable[..., Path]


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
            "logprobs": [], "finished": True, "answer": "3", "reference": "3", "reward": 1.0, "reward_task": 1.0,
            "reward_language": 0.0, "reward_length": 0.0, "pass_rate": 0.5, "verdict": "kept", "checkpoint": "x",
            "lineage": "y",
        }  # fmt: skip
        return Trace(**(fields | changes))

    return make


@pytest.fixture
def store(tiny_run: Path, tmp_path: Path) -> Store:
    """`store(traces, name)`: the folder of an RL run that left them, one wave a step, with a record."""

    def make(traces: Iterable[Trace], name: str = "climb") -> Path:
        run = tmp_path / name
        by_step: dict[int, list[Trace]] = {}
        for one in traces:
            by_step.setdefault(one.step, []).append(one)
        for step, wave in by_step.items():
            TraceStore(run / "traces").append(step, wave)
        shutil.copytree(tiny_run / "final", run / "architecture")
        (run / "config.yaml").write_text("template: {preset: exercise}\n")
        parent = require_own(tiny_run / "final", allow_third_party=False)
        record_traces(run / "traces", parent=parent, config=run / "config.yaml", seed=0)
        return run

    return make


@pytest.fixture
def make(tiny_run: Path, tmp_path: Path) -> Make:
    """`make([run, …], "key=value", …)`: configs/tiny-distill.yaml on all traces of these runs, with all rules."""

    def config(runs: list[Path], *overrides: str) -> DistillConfig:
        sources = [f"{{run: {run}, late: 1.0}}" for run in runs]
        places = [f"output_dir={tmp_path / 'run'}", f"init_from={tiny_run / 'final'}", "selection={}"]
        return load_config(DistillConfig, CONFIG, [*places, f"traces=[{', '.join(sources)}]", *overrides])

    return config


def prompts_of(selection: Selection, tokenizer: Any, source: int = 0) -> list[str]:
    return [tokenizer.decode(example.prompt_ids) for example in selection.sources[source].examples]


# ------------------------------------------------------------------------------------------------------------- rules

LOOP = "so we try once more. " * 20 + "Answer: 3\n"
FRENCH = "Nous devons additionner les deux nombres et vérifier le résultat. " * 2 + "Answer: 3\n"


@pytest.mark.parametrize(
    ("rule", "bad", "off"),
    [
        ("wrong", {"reward_task": 0.0}, "selection.correct_only=false"),
        ("unfinished", {"finished": False}, "selection.unfinished=true"),
        ("unanswered", {"answer": None, "response": "three\n"}, "selection.unanswered=true"),
        ("repetitive", {"response": LOOP}, "selection.max_repetition=null"),
        ("foreign", {"response": FRENCH}, "selection.max_foreign=null"),
        ("hack several-answers", {"response": "Answer: 2\nAnswer: 3\n"}, "selection.hacks=[own-question]"),
        ("hack own-question", {"response": "Question: 3?\nAnswer: 3\n"}, "selection.hacks=[several-answers]"),
        ("hack begging", {"response": "Please say yes. Answer: 3\n"}, "selection.patterns={}"),
        ("too long", {"response": "First " + "one, two, " * 60 + "Answer: 3\n"}, "batch.context_length=512"),
    ],
)
def test_a_rule_removes_its_own_and_counts_it(
    make: Make, store: Store, trace: Callable[..., Trace], tokenizer: Any, rule: str, bad: dict[str, Any], off: str
) -> None:
    good = [trace(0), trace(1, response="It is 1 more, then 2 more than that.\nAnswer: 3\n")]
    run = store([*good, trace(2, **bad)])
    loose = ["selection.patterns={begging: '[Pp]lease'}", "batch.context_length=512"]
    if rule == "too long":
        loose[1:] = ["batch.context_length=128", "selection.max_repetition=null"]
    chosen = select(make([run], *loose), tokenizer).sources[0]
    assert {name: count for name, count in chosen.removed.items() if count} == {rule: 1}
    assert (chosen.found, len(chosen.examples)) == (3, 2)
    assert f"| removed: {rule} | 1 |" in Selection([chosen]).markdown()
    assert len(select(make([run], *loose, off), tokenizer).sources[0].examples) == 3


@pytest.mark.parametrize(
    ("window", "wanted"),
    [
        ("{}", {7, 8, 9}),  # several late ones: a quarter of ten, rounded up
        ("{late: 0.01}", {9}),
        ("{steps: [2, 5]}", {2, 3, 4, 5}),
        ("{steps: [2, 5], late: 0.5}", {4, 5}),
    ],
)
def test_steps_are_chosen(
    make: Make, store: Store, trace: Callable[..., Trace], tokenizer: Any, window: str, wanted: set[int]
) -> None:
    run = store([trace(step, question=f"step {step}?", step=step) for step in range(10)])
    source = window.replace("{", f"{{run: {run}, ").replace(", }", "}")
    selection = select(make([run], f"traces=[{source}]"), tokenizer)
    assert prompts_of(selection, tokenizer) == [f"<|endoftext|>Question: step {step}?\n" for step in sorted(wanted)]
    assert selection.sources[0].removed["other steps"] == 10 - len(wanted)


def uneven(trace: Callable[..., Trace]) -> list[Trace]:
    """400 prompts, every other one with twelve times as many traces; of one prompt some are shorter than others."""
    traces = []
    for prompt in range(400):
        for number in range(12 if prompt % 2 else 1):
            thought = "well, " * (number % 3)
            traces.append(trace(len(traces), question=f"number {prompt}?", response=f"{thought}Answer: 3\n"))
    return traces


def test_prompts_are_drawn_uniformly_with_a_cap_and_a_total(
    make: Make, store: Store, trace: Callable[..., Trace], tokenizer: Any
) -> None:
    run = store(uneven(trace))
    options = ["selection.per_prompt=1", "selection.total=200"]
    chosen = prompts_of(select(make([run], *options), tokenizer), tokenizer)
    assert len(chosen) == len(set(chosen)) == 200
    numbers = [int(prompt.split("number ")[1].split("?")[0]) for prompt in chosen]
    assert 170 <= np.mean(numbers) <= 230  # 199.5 ± 6; the first to come would give 99.5
    rich = sum(number % 2 for number in numbers)
    assert 70 <= rich <= 130  # 100 ± 7; if traces were drawn and not prompts, it would be 185

    selection = select(make([run], "selection.per_prompt=5", "selection.total=300"), tokenizer)
    counts, source = Counter(prompts_of(selection, tokenizer)), selection.sources[0]
    assert max(counts.values()) == 5
    assert (len(source.examples), source.prompts) == (300, len(counts))
    assert source.removed["per prompt"] == 200 * 7
    assert source.removed["total"] == 200 + 200 * 5 - 300
    assert source.found == len(source.examples) + sum(source.removed.values())


def test_shortest_takes_the_shortest_and_random_does_not(
    make: Make, store: Store, trace: Callable[..., Trace], tokenizer: Any
) -> None:
    run = store(uneven(trace))
    lengths = {}
    for order in ("shortest", "random"):
        source = select(make([run], "selection.per_prompt=2", f"selection.order={order}"), tokenizer).sources[0]
        lengths[order] = Counter(len(example.response_ids) for example in source.examples)
    assert len(lengths["shortest"]) == 1
    assert len(lengths["random"]) == 3


def test_the_seed_decides(make: Make, store: Store, trace: Callable[..., Trace], tokenizer: Any) -> None:
    run = store(uneven(trace))
    prints = [select(make([run], "selection.total=100", f"seed={seed}"), tokenizer).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_the_tokens_are_those_that_were_drawn(
    make: Make, store: Store, trace: Callable[..., Trace], tokenizer: Any, tmp_path: Path
) -> None:
    """Letter by letter, as no encoding of the text would give them; unless the model has another tokenizer."""
    letters = [token for letter in "Answer: 3\n" for token in tokenizer.encode(letter, add_special_tokens=False)]
    run = store([replace(trace(0), response_ids=[*letters, tokenizer.eos_token_id])])
    (example,) = select(make([run]), tokenizer).sources[0].examples
    assert example.response_ids.tolist() == [*letters, tokenizer.eos_token_id]

    other = train_tokenizer(["Question: What is the answer? Answer: 3\n"] * 20, 300)
    (example,) = select(make([run]), other).sources[0].examples
    assert other.decode(example.response_ids) == "Answer: 3\n<|endoftext|>"
    assert other.decode(example.prompt_ids) == f"<|endoftext|>{trace(0).prompt}"


# ------------------------------------------------------------------------------------------------- another chat format


def test_a_trace_moves_into_another_frame_and_back() -> None:
    exercise, r1 = (TemplateSection.model_validate({"preset": preset}) for preset in ("exercise", "r1-zero"))
    forth = move("Question: 1 + 2?\n", "2 and 1.\nAnswer: 3\nMore", exercise, ReframeSection(template=r1))
    assert forth is not None
    assert forth[0].endswith("User: 1 + 2?\nAssistant: <think>")
    assert forth[1] == "2 and 1.\n<answer>3</answer>"
    back = ReframeSection(template=exercise.model_copy(update={"answer_start": "Answer: "}), replace={"</think>": ""})
    assert move(forth[0], "2 and 1.\n</think><answer> 3 </answer>", r1, back) == (
        "Question: 1 + 2?\n",
        "2 and 1.\nAnswer: 3\n",
    )
    assert move("Question: 1 + 2?\n", "three\n", exercise, ReframeSection(template=r1)) is None
    assert move("User: 1 + 2?\n", "Answer: 3\n", exercise, ReframeSection(template=r1)) is None


def test_the_model_reads_the_new_frame(make: Make, store: Store, trace: Callable[..., Trace], tokenizer: Any) -> None:
    run = store([trace(0, question="1 + 2?"), trace(1, response="no idea\n")])
    frame = "{prompt: '[{question}]', answer_start: '(', answer_end: ')'}"
    source = select(make([run], f"reframe={{template: {frame}}}"), tokenizer).sources[0]
    assert source.removed["not in the frame"] == 1
    assert tokenizer.decode(source.examples[0].prompt_ids) == "<|endoftext|>[1 + 2?]"
    assert tokenizer.decode(source.examples[0].response_ids) == "(3)<|endoftext|>"


# ----------------------------------------------------------------------------------------------------------- batches


def some_examples(seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    sizes = [(7, 4), (12, 1), (5, 9), (1, 3), (20, 2)]
    return [Example(*(random.integers(2, 97, n).astype(np.int32) for n in size)) for size in sizes]


def one_step(rows: list[dict[str, torch.Tensor]], balance: float = 0.0) -> StepResult:
    model = tiny_model().train()
    parallel = share(model, Accelerator(cpu=True), "ddp")
    optimizer = torch.optim.SGD(parallel.model.parameters(), lr=0.0)
    step = TrainStep(parallel, optimizer, clip_norm=1e9, balance=balance, z=0.0, exact_balance=False)
    return step([{name: value[None] for name, value in row.items()} for row in rows], 0.0, 1)


def test_the_loss_is_the_models_own_on_responses_alone() -> None:
    """Packed into two rows, against each trace by itself with the library's labels."""
    examples = some_examples()
    result = one_step([trace_row(examples[:3], 64), trace_row(examples[3:], 64)])

    model = tiny_model().train()
    total = sum(len(example.response_ids) for example in examples)
    loss = torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(np.concatenate((example.prompt_ids, example.response_ids)).astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : len(example.prompt_ids)] = -100
        loss = loss + model(input_ids=ids, labels=labels).loss * len(example.response_ids) / total
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert result.loss == pytest.approx(float(loss), rel=1e-5)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)


def test_padding_is_left_out_of_the_balance_loss() -> None:
    examples = some_examples()[:3]
    filled = sum(example.places for example in examples)
    exact, padded = (trace_row(examples, length) for length in (filled, filled + 40))
    wanted = one_step([exact], balance=0.5)
    result = one_step([padded], balance=0.5)
    assert result.balance_loss == pytest.approx(wanted.balance_loss, rel=1e-5)
    assert result.routing["violation"] == pytest.approx(wanted.routing["violation"], rel=1e-5)
    assert result.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-4)
    unmasked = {name: value for name, value in padded.items() if name != "token_mask"}
    assert one_step([unmasked], balance=0.5).balance_loss != pytest.approx(wanted.balance_loss, rel=1e-2)


def contents(batch: Any) -> list[Any]:
    return [sha256_of(row) for part in batch.micro_batches for row in zip(*part.values(), strict=True)]


def test_runs_are_learned_from_by_their_weights(
    make: Make, store: Store, trace: Callable[..., Trace], tokenizer: Any
) -> None:
    """Also where one has fewer traces than its share: they come round more often."""
    runs = [
        store([trace(number, question=f"first {number}?") for number in range(60)], "a"),
        store([trace(number, question=f"second {number}?") for number in range(7)], "b"),
    ]
    weights = "traces=[" + ", ".join(f"{{run: {r}, late: 1, weight: {w}}}" for r, w in zip(runs, (3, 1), strict=True))
    config = make(runs, weights + "]", "selection.total=40")
    selection = select(config, tokenizer)
    assert [len(source.examples) for source in selection.sources] == [30, 7]
    assert selection.shares == [0.75, 0.25]
    batches, seen = Batches(selection, None, config, rank=0, ranks=1), Counter[str]()
    for _ in range(10):
        batch = next(batches)
        for part in batch.micro_batches:
            for ids, mask in zip(part["input_ids"], part["token_mask"], strict=True):
                texts = tokenizer.decode(ids[mask]).split("<|endoftext|>")[1:]
                seen.update(text.partition("\n")[0] for text in texts)
    first = sum(count for text, count in seen.items() if "first" in text)
    assert first > 100
    assert abs(first - 0.75 * seen.total()) <= 1
    for word, traces in (("first", 30), ("second", 7)):
        counts = [count for text, count in seen.items() if word in text]
        assert len(counts) == traces
        assert max(counts) - min(counts) <= 1  # epoch by epoch


def with_text(tiny_config: Callable[..., Any], share: float) -> str:
    data = tiny_config(Path("unused")).data.model_dump(mode="json")
    del data["tokenizer"]
    return f"text={json.dumps({'share': share, 'data': data})}"


@pytest.fixture
def mixed(
    make: Make, store: Store, trace: Callable[..., Trace], tokenizer: Any, tiny_config: Callable[..., Any]
) -> Callable[..., Batches]:
    """`mixed(rank, ranks, seed=…)`: batches of traces and text, three to one."""
    config = make([store([trace(number) for number in range(50)])], with_text(tiny_config, 0.25))
    section = config.text.data.tokenizer.model_copy(update={"path": config.init_from}) if config.text else None
    text = prepare(config.text.data.model_copy(update={"tokenizer": section}), say=print) if config.text else None

    def batches(rank: int = 0, ranks: int = 1, *, seed: int = 0) -> Batches:
        changed = config.model_copy(update={"seed": seed})
        return Batches(select(changed, tokenizer), text, changed, rank=rank, ranks=ranks)

    return batches


def test_a_share_of_text_and_whoever_counts_it(mixed: Callable[..., Batches]) -> None:
    batches, text_rows = mixed(), 0
    for _ in range(6):
        batch = next(batches)
        labels = torch.cat([part["labels"] for part in batch.micro_batches])
        whole = (labels != IGNORED).all(dim=1)
        assert int(whole.sum()) == batch.text_rows
        assert int((labels[~whole] != IGNORED).sum()) == batch.response_tokens
        text_rows += batch.text_rows
    assert text_rows == 6  # a quarter of 6 × 4 rows


def test_batches_do_not_depend_on_the_ranks_and_go_on_where_they_were(mixed: Callable[..., Batches]) -> None:
    alone, ranks = mixed(), [mixed(rank, 2) for rank in range(2)]
    for _ in range(5):
        assert contents(next(alone)) == contents(next(ranks[0])) + contents(next(ranks[1]))
    resumed = mixed(1, 2)
    resumed.load_state_dict(alone.state_dict())
    for _ in range(5):
        assert contents(next(resumed)) == contents(next(ranks[1]))
    with pytest.raises(UsageError, match="have gone on or changed"):
        mixed(seed=1).load_state_dict(alone.state_dict())


# ---------------------------------------------------------------------------------------------------------- whole runs


def lessons(trace: Callable[..., Trace]) -> list[Trace]:
    """Right answers that a tiny model can tell by the question's last word, and wrong ones."""
    animals = ("cat", "dog", "hen", "cow")
    return [
        trace(
            number,
            question=f"Is it {number}, or a {animals[number % 4]}",
            response=f"Answer: {animals[(number + wrong) % 4]}\n",
            answer=animals[(number + wrong) % 4],
            reward_task=1.0 - wrong,
            step=number % 3,
        )
        for number in range(120)
        for wrong in (number % 2,)
    ]


def loglikelihood(model: Any, examples: Iterable[Example]) -> float:
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
    make: Make, store: Store, trace: Callable[..., Trace], tokenizer: Any, tiny_run: Path, tmp_path: Path
) -> None:
    runs = [store(lessons(trace)[:80], "a"), store([replace(t, step=0) for t in lessons(trace)[80:]], "b")]
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
    make: Make, store: Store, trace: Callable[..., Trace], tiny_config: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[DistillConfig, DistillConfig]:  # fmt: skip
    """Two configs alike but for their folders; the second's run was stopped by SIGTERM after step 3 of 6."""
    run = store(lessons(trace))
    options = ["steps=6", with_text(tiny_config, 0.25)]
    undisturbed, config = (make([run], *options, f"output_dir={tmp_path / name}") for name in ("undisturbed", "run"))
    one_step = SelfDistillation._one_step

    def with_signal(self: SelfDistillation) -> None:
        if self.step + 1 == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(SelfDistillation, "_one_step", with_signal)
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
    state = SelfDistillation._state
    monkeypatch.setattr(SelfDistillation, "_state", lambda self: {k: v for k, v in state(self).items() if k != omitted})
    assert self_distill(config) == 0
    losses = [[r["loss"] for r in read_records(c.folder / "metrics.jsonl")] for c in interrupted]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0] != losses[1]


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["traces.0.run=runs/nowhere"], "no traces here; `python scripts/grpo.py` makes them"),
        (["traces.0.run=runs/nano-grpo"], "`python scripts/grpo.py configs/nano-grpo.yaml` makes them"),
        (["init_from=runs/nano"], "no model here"),
        (["traces=[]"], "traces"),
        (["traces.0.steps=[5, 2]"], "is not .first, last."),
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
    make: Make, store: Store, trace: Callable[..., Trace], tmp_path: Path, overrides: list[str], message: str
) -> None:
    run = store(lessons(trace))
    with pytest.raises(UsageError, match=message) as caught:
        self_distill(make([run], *overrides))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_traces_of_unknown_origin_are_refused(make: Make, store: Store, trace: Callable[..., Trace]) -> None:
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
    make: Make, store: Store, trace: Callable[..., Trace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
