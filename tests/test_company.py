"""The model among the tools that people have: trainers, adapters, evaluation, caches, the compiler, trackers; each as
it comes, and skipped where it is not installed (extras `company` and `trackers`)."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model
from tiny_models import tiny_model

ROOT = Path(__file__).parents[1]
TEXTS = [f"Question: What is {n} plus {m}?\nAnswer: {n + m}\n" for n in range(2) for m in range(4)]
TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def base(tiny_run: Path) -> Path:
    """The tiny run's model folder."""
    return tiny_run / "final"


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """What TRL's trainers need in order to train in a test: on the CPU, in fp32, silent."""
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "seed": 1, **quiet, **changes}


def logprobs(model: Any, ids: list[int], start: int) -> float:
    """The log-probability of `ids[start:]` behind the rest."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None]).sum())


# ---------------------------------------------------------------------------------------------------------- trainers


def test_trl_fine_tunes_the_checkpoint(base: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    settings = arguments(tmp_path, max_steps=4, learning_rate=1e-2, router_aux_loss_coef=0.0, max_length=64)
    trainer = trl.SFTTrainer(str(base), args=trl.SFTConfig(**settings), train_dataset=data, eval_dataset=data)
    model, tokenizer = load_model(base).eval(), AutoTokenizer.from_pretrained(base)
    documents = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in TEXTS]
    total = sum(logprobs(model, ids, 1) for ids in documents)
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(-total / sum(len(ids) - 1 for ids in documents), rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.2
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    ids = torch.tensor([documents[0]])
    torch.testing.assert_close(tuned(ids).logits, trainer.model.eval()(ids).logits)


def test_trl_climbs_from_the_checkpoint(base: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    def vowels(completions: list[str], **_: Any) -> list[float]:
        return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]

    settings = arguments(
        tmp_path, max_steps=8, learning_rate=1e-2, per_device_train_batch_size=32, num_generations=16,
        max_completion_length=12, lr_scheduler_type="constant",
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"prompt": [text.split("Answer")[0] for text in TEXTS]})
    trainer = trl.GRPOTrainer(str(base), vowels, trl.GRPOConfig(**settings), data)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == 8
    assert all(step["grad_norm"] > 0 and step["aux_loss"] >= 1 for step in steps)
    assert sum(s["reward"] for s in steps[-2:]) > sum(s["reward"] for s in steps[:2])
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before)


# ---------------------------------------------------------------------------------------------------------- adapters


def test_peft_adapts_attention_and_dense_layers(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.tensor([AutoTokenizer.from_pretrained(base).encode(TEXTS[0])])
    plain = load_model(base).eval()
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=PROJECTIONS, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(load_model(base), settings).eval()
    adapted = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert len(adapted) == 6 * 4 + 3 * 3
    frozen = {name: value.clone() for name, value in plain.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert (logits - plain(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(again(input_ids=ids).logits, logits)
        assert torch.equal(model.get_base_model().lm_head.weight, frozen["lm_head.weight"])
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------- evaluation


def test_lm_eval_scores_a_local_task(base: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    choices = [" 3", " seven hundred", " the"]
    rows = [{"question": text.split(" ")[0], "choices": choices, "label": i % 3} for i, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(
        json.dumps(
            {
                "task": "local",
                "dataset_path": "json",
                "dataset_kwargs": {
                    "data_files": {"validation": str(tmp_path / "rows.jsonl")},
                    "cache_dir": str(tmp_path / "cache"),
                },
                "output_type": "multiple_choice",
                "validation_split": "validation",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "label",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc"}],
            }
        )
    )
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(base), "dtype": "float32", "max_length": 64},
        tasks=["local"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    model, tokenizer = load_model(base).eval(), AutoTokenizer.from_pretrained(base)
    right = []
    for row, sample in zip(rows, sorted(results["samples"]["local"], key=lambda s: s["doc_id"]), strict=True):
        context = tokenizer.encode(row["question"])
        expected = [logprobs(model, context + tokenizer.encode(choice), len(context)) for choice in choices]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(expected, abs=1e-3)
        right.append(expected.index(max(expected)) == row["label"])
    assert results["results"]["local"]["acc,none"] == pytest.approx(sum(right) / len(right))


# ----------------------------------------------------------------------------------------- generation, the compiler


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "windowed_sdpa"])
def test_generate_with_a_static_cache(attention: str, offset: bool) -> None:
    """The same tokens as with the cache that grows, from ragged prompts and beyond the window of 8."""
    model = tiny_model(attention=attention, offset_keys=offset)
    ids = torch.randint(2, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) >= torch.tensor([[0], [4], [9]])).long()
    settings = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=1)
    grown = model.generate(ids, attention_mask=mask, generation_config=settings)
    settings.cache_implementation = "static"
    static = model.generate(ids, attention_mask=mask, generation_config=settings, return_dict_in_generate=True)
    assert type(static.past_key_values).__name__ == "StaticCache"
    assert torch.equal(static.sequences, grown)
    assert len(set(grown[:, 12:].flatten().tolist())) > 5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_with_continuous_batching(attention: str) -> None:
    """The library's paged cache, by its own `generate_batch`: long prompts in parts, and more requests than there is
    room for at once, give the tokens that each prompt gives alone."""
    model = tiny_model(attention=attention)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 97, (length,), generator=draw).tolist() for length in (3, 11, 40, 7, 15, 28)]
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
    alone = [model.generate(torch.tensor([p]), generation_config=settings)[0, len(p) :].tolist() for p in prompts]
    settings.eos_token_id = 96  # which nothing here draws: it asks for one
    batching = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)
    outputs = model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=batching, progress_bar=False
    )
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert [by_prompt[tuple(prompt)] for prompt in prompts] == alone
    assert len({token for tokens in alone for token in tokens}) > 5


def test_continuous_batching_says_that_it_has_no_offset_keys() -> None:
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=96, pad_token_id=1)
    batching = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)
    outputs = tiny_model(offset_keys=True).generate_batch(
        [[5, 6, 7]], generation_config=settings, continuous_batching_config=batching, progress_bar=False
    )
    (output,) = outputs.values()
    assert "use `generate`" in output.error


@pytest.mark.parametrize(
    ("experts", "backend"),
    [
        ("grouped_mm", "aot_eager"),
        ("bucketed_mm", "aot_eager"),
        pytest.param("bucketed_mm", "inductor", marks=pytest.mark.slow),
    ],
)
def test_the_model_compiles_forward_and_backward(experts: str, backend: str) -> None:
    """In one graph."""
    ids = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    results = []
    for compiled in (False, True):
        model = tiny_model(num_hidden_layers=2, attention_period=2, experts=experts).train()
        if compiled:
            model.compile(backend=counter, fullgraph=True)
        output = model(ids, use_cache=False)
        F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        results.append((output.logits, {name: p.grad for name, p in model.named_parameters()}))
    (logits, gradients), (compiled_logits, compiled_gradients) = results
    assert counter.op_count > 150
    torch.testing.assert_close(compiled_logits, logits, atol=1e-5, rtol=1e-5)
    assert all(gradient is not None for gradient in gradients.values())
    torch.testing.assert_close(compiled_gradients, gradients, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- trackers


@pytest.fixture(scope="module")
def tracked(tiny_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, in a process of its own, recorded by every tracker that is installed."""
    folder = tmp_path_factory.mktemp("tracked")
    installed = [name for name in TRACKERS if importlib.util.find_spec(name)]
    cache = tiny_config(folder).data.cache_dir
    steps = ["steps=3", "schedule.warmup_steps=1", "evaluation.every=3"]
    changes = [*steps, f"output_dir={folder / 'run'}", f"data.cache_dir={cache}", f"tracking.trackers={installed}"]
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), str(ROOT / "configs" / "tiny.yaml"), *changes]
    subprocess.run(command, env={**os.environ, **offline, "HF_HUB_OFFLINE": "1"}, check=True)
    return folder


def losses(folder: Path) -> list[float]:
    """Of its steps, as metrics.jsonl has them."""
    return [r["loss"] for r in read_records(folder / "run" / "metrics.jsonl") if "kind" not in r]


def test_tensorboard_records_a_run(tracked: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recorded = {}
    for events in (tracked / "run" / "trackers").rglob("events.out.tfevents.*"):  # one of them holds the config
        reader = accumulator.EventAccumulator(str(events))
        reader.Reload()
        if "loss" in reader.Tags()["scalars"]:
            recorded |= {event.step: event.value for event in reader.Scalars("loss")}
    assert recorded == pytest.approx(dict(enumerate(losses(tracked), start=1)))


def test_wandb_records_a_run_offline(tracked: Path) -> None:
    pytest.importorskip("wandb")
    (run,) = (tracked / "wandb").glob("offline-run-*")
    (record,) = run.glob("*.wandb")
    content = record.read_bytes()
    assert len(losses(tracked)) == 3
    assert all(json.dumps(loss).encode() in content for loss in losses(tracked))


def test_trackio_records_a_run(tracked: Path) -> None:
    pytest.importorskip("trackio")
    (database,) = (tracked / "trackio").glob("tiny*.db")
    rows = sqlite3.connect(database).execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    recorded = {step: json.loads(metrics)["loss"] for step, metrics in rows if "loss" in json.loads(metrics)}
    assert recorded == pytest.approx(dict(enumerate(losses(tracked), start=1)))
