"""Measurements that the README quotes: `python scripts/bench.py WHAT`, each alternating its sides in one run.

zero-start   expert load at initialisation, attention's output gains ordinary or zero
experts      our expert computation against the library's, forward and backward
checkpoint   what saving costs the loop, asynchronously and synchronously
rollout      our engine against `generate`, response lengths as they fall and all equal
grpo         a whole step of the climb against one of TRL's GRPOTrainer
recovery     from a worker's death to the next step, from the warm standby and from a cold start
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from mai_thinking.config.command import exit_with
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "configs" / "nano.yaml"
NANO_GRPO = ROOT / "configs" / "nano-grpo.yaml"


def zero_start() -> None:
    """Violation rate (max load / mean load − 1) of each MoE layer on one batch of real text, fresh weights."""
    import torch

    from mai_thinking.data import Loader, prepare
    from mai_thinking.training.model_files import build_model, model_config

    config = load_config(PretrainConfig, NANO)
    data = prepare(config.data)
    with Loader(data, context_length=512, micro_batch_size=32, rows_per_step=32) as loader:
        batch = next(loader).micro_batches[0]
    print("highest violation rate over the MoE layers at initialisation, 16,384 tokens, five seeds")
    print(f"{'initial weights':<18}{'ordinary gains':>16}{'zero gains':>12}")
    for spread in (0.02, config.model["initializer_range"]):
        highest = {}
        for zero in (False, True):
            worst = []
            for seed in range(5):
                changes = {"zero_init_attention": zero, "initializer_range": spread}
                run = config.model_copy(update={"seed": seed, "model": config.model | changes})
                model = build_model(run, model_config(run, data.tokenizer)).eval()
                with torch.no_grad():
                    ids, positions = batch["input_ids"], batch["position_ids"]
                    counts = model(ids, position_ids=positions, use_cache=False).routing.counts_E
                worst.append(float((counts.amax(-1) / counts.mean(-1) - 1).max()))
            highest[zero] = median(worst)
        print(f"{f'N(0, {spread})':<18}{highest[False]:>16.2f}{highest[True]:>12.2f}")


def experts() -> None:
    """Milliseconds of one nano LatentMoE layer's experts, forward and backward."""
    import torch
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from mai_thinking.model.latent_moe import Experts
    from mai_thinking.training.model_files import build_model, model_config

    config = load_config(PretrainConfig, NANO)
    model = build_model(config, model_config(config))
    layer = next(module for module in model.modules() if isinstance(module, Experts))
    print(f"{'tokens':>7}{'bucketed_mm':>13}{'grouped_mm':>12}   (median ms of 15, alternating)")
    for tokens in (512, 4096):
        x = torch.randn(tokens, layer.gate_up_proj.size(2), requires_grad=True)
        chosen = torch.stack([torch.randperm(512)[:8] for _ in range(tokens)])
        gates = torch.rand(tokens, 8, requires_grad=True)
        seconds: dict[str, list[float]] = {"bucketed_mm": [], "grouped_mm": []}
        for _ in range(18):
            for name, taken in seconds.items():
                begin = time.perf_counter()
                out = ALL_EXPERTS_FUNCTIONS[name](layer, x, chosen, gates)
                out.backward(torch.ones_like(out).contiguous())
                taken.append(time.perf_counter() - begin)
        ours, theirs = (1e3 * median(taken[3:]) for taken in seconds.values())
        print(f"{tokens:>7}{ours:>13.1f}{theirs:>12.1f}   {theirs / ours:.2f} times as fast")


def checkpoint() -> None:
    """Train nano and save every tenth step, in turn in the background and at once."""
    from mai_thinking.pretraining import Pretraining
    from mai_thinking.training.run_folder import RunFolder
    from mai_thinking.training.session import make_accelerator

    with tempfile.TemporaryDirectory(dir=ROOT) as name, contextlib.ExitStack() as stack:
        config = load_config(PretrainConfig, NANO, [f"output_dir={name}/run", "steps=10000"])
        folder = RunFolder(config.folder)
        run = Pretraining(config, folder, make_accelerator(config, folder), stack)
        cost: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
        steps: list[float] = []
        for batch in run.loader:
            begin = time.perf_counter()
            run._train(batch)
            steps.append(time.perf_counter() - begin)
            run.session.checkpointer.due(run.step)
            if run.step % 10 == 0:
                synchronous = run.step // 10 % 2 == 0
                stall = run.session.checkpointer.save(run.step, run._state(), synchronous=synchronous)
                cost[synchronous].append((stall, len(steps)))
            if run.step == 165:
                break
    usual = median(steps)
    print(f"step {usual:.3f} s (median); {len(cost[True])} saves each way, the first of each left out")
    results = {}
    for synchronous, saves in cost.items():
        stall = median(seconds for seconds, _ in saves[1:])
        slower = median(sum(steps[at : at + 9]) - 9 * usual for _, at in saves[1:])
        results[synchronous] = stall + max(0.0, slower)
        word = "synchronous" if synchronous else "asynchronous"
        print(f"{word:<13} stall {stall:.3f} s, and the nine steps after it {slower:+.3f} s")
    print(f"asynchronous / synchronous: {results[False] / results[True]:.2f}")


def recovery() -> None:
    """Kill a worker of a two-worker nano run; the same run is then started cold. Seconds to the next whole step."""
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        folder = Path(name) / "run"
        warm, cold = [], []
        for number in range(4):
            script = [str(ROOT / "scripts" / "pretrain.py"), str(NANO), f"output_dir={folder}", "checkpoint.every=20"]
            command = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--nproc", "2", *script]
            begin = time.monotonic()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            before = _steps(folder)
            _wait_for_steps(folder, before + 1)
            if number:
                cold.append(time.monotonic() - begin)
            _wait_for_steps(folder, before + 25)
            victims = subprocess.run(["pgrep", "-g", str(_worker(process.pid))], capture_output=True, text=True)
            before, begin = _steps(folder), time.monotonic()
            os.kill(int(victims.stdout.split()[0]), signal.SIGKILL)
            _wait_for_steps(folder, before + 1)
            warm.append(time.monotonic() - begin)
            process.terminate()
            process.wait()
    print("kill to the next completed step, warm standby:", *(f"{s:.1f}" for s in warm))
    print("cold start to the same:                       ", *(f"{s:.1f}" for s in cold))
    print(f"warm / cold: {median(warm) / median(cold):.2f}")


def rollout() -> None:
    """Tokens per second on the nano model, runs/nano/final if it is there and else fresh weights: 512 requests, 16 a
    prompt, temperature 1, top-p 0.97. As they fall: limits spread evenly over 4 … 100 tokens, fewer where the model
    ends by itself. The engine has 256 slots; `generate` takes 256 requests at a time. The engine returns nuclei,
    experts and log-probabilities besides."""
    import numpy as np
    import torch

    from mai_thinking.rl.rollouts import BatchedEngine, Request
    from mai_thinking.training.model_files import build_model, load_model, model_config

    config = load_config(PretrainConfig, NANO)
    trained = config.folder / "final"
    model = (load_model(trained) if trained.exists() else build_model(config, model_config(config))).eval()
    print(f"{trained if trained.exists() else 'fresh weights'}, {torch.get_num_threads()} threads")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, model.config.vocab_size, rng.integers(10, 31)).tolist() for _ in range(32)]
    settings: dict[str, Any] = {"slots": 256, "temperature": 1.0, "top_p": 0.97, "seed": 0}
    print(f"{'lengths':<14}{'engine':>10}{'generate':>10}   (median tokens/s of 3, alternating)")
    for name, limits, end in (("as they fall", rng.integers(4, 101, 512), 0), ("all 50", np.full(512, 50), None)):
        requests = [Request(i, prompts[i // 16], int(limit)) for i, limit in enumerate(limits)]
        engine = BatchedEngine(model, **settings, end_of_text=end)
        rates: dict[str, list[float]] = {"engine": [], "generate": []}
        for repetition in range(4):
            for side, taken in rates.items():
                begin = time.perf_counter()
                if side == "engine":
                    tokens = sum(len(one.response_ids) for one in engine.generate(requests))
                else:
                    tokens = sum(_generate(model, requests[i : i + 256], end) for i in range(0, len(requests), 256))
                if repetition:
                    taken.append(tokens / (time.perf_counter() - begin))
        ours, theirs = (median(taken) for taken in rates.values())
        print(f"{name:<14}{ours:>10.0f}{theirs:>10.0f}   {ours / theirs:.2f} times as fast")


def grpo() -> None:
    """Seconds of a whole step of nano's climb, new weights for the engine each step: 16 problems, 16 responses to each
    of at most 32 tokens, graded, all learned from. From runs/nano/final; TRL (extra `company`) has the same problems in
    the same order, sampling, reward, and a learning rate so low that both policies stay what they are. It grades in
    its own process, replays nothing, balances nothing and keeps no traces."""
    from mai_thinking.rl.trainer import Climb
    from mai_thinking.training.metrics import read_records
    from mai_thinking.training.run_folder import RunFolder
    from mai_thinking.training.session import make_accelerator

    steps = 8
    with tempfile.TemporaryDirectory(dir=ROOT) as name, contextlib.ExitStack() as stack:
        changes = ["rollouts.steps_per_update=1", "sampling.final_range=null", "optimizer.learning_rate=1e-6"]
        places = [f"output_dir={name}/run", f"init_from={ROOT}/runs/nano/final", "tracking.print_every=1e9"]
        config = load_config(GrpoConfig, NANO_GRPO, [*changes, *places])
        folder = RunFolder(config.folder)
        climb = Climb(config, folder, make_accelerator(config, folder), stack)
        climb.parallel.model.train()
        trainer, theirs = _trl_trainer(climb, steps, f"{name}/trl")
        trainer.train()
        rollouts = config.groups_per_step * config.sampling.full_size
        records = read_records(folder.metrics)
    ours = [(r["seconds"], r["rollout_seconds"], r["response_length"] * rollouts) for r in records]
    print(f"{'':<6}{'step':>8}{'rollouts':>10}{'learning':>10}{'tokens':>8}   (median s of {steps - 1}, alternating)")
    for side, rows in (("ours", ours[1:]), ("TRL", theirs[1:])):
        whole, generating, tokens = (median(row[part] for row in rows) for part in range(3))
        learning = median(row[0] - row[1] for row in rows)
        print(f"{side:<6}{whole:>8.2f}{generating:>10.2f}{learning:>10.2f}{tokens:>8.0f}")
    ratios = [their[0] / our[0] for our, their in zip(ours[1:], theirs[1:], strict=True)]
    ratio = median(row[0] for row in theirs[1:]) / median(row[0] for row in ours[1:])
    print(f"{ratio:.2f} times as fast; step by step {min(ratios):.2f} … {max(ratios):.2f}")


def _trl_trainer(climb: Any, steps: int, folder: str) -> tuple[Any, list[tuple[float, float, int]]]:
    """TRL's trainer of the climb's first model on its problems, which lets the climb make a step after each of its own;
    and where it will leave, for each step, the seconds, those of them up to the last reward, and response tokens."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from mai_thinking.training.model_files import load_model

    config, mix, group = climb.config, climb.collector.mix, climb.config.sampling.full_size
    problems = [mix.problem("train", number) for number in range(steps * config.groups_per_step)]
    opening, template = climb.tokenizer.eos_token, climb.collector.responder.template
    rows: list[tuple[float, float, int]] = []
    now = time.perf_counter
    began, rewarded, tokens = 0.0, 0.0, 0

    def reward(completions: list[str], completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        nonlocal rewarded, tokens
        rewards = _rewards(climb, [problems[i] for i in number], completions)
        rewarded, tokens = now(), sum(map(len, completion_ids))
        return rewards

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            began = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            rows.append((now() - began, rewarded - began, tokens))
            climb._one_step()

    arguments = GRPOConfig(
        folder, max_steps=steps, per_device_train_batch_size=config.groups_per_step * group, num_generations=group,
        max_completion_length=config.curriculum.end, temperature=config.rollouts.temperature,
        top_p=config.rollouts.top_p, learning_rate=config.optimizer.learning_rate, lr_scheduler_type="constant",
        max_grad_norm=config.optimizer.clip_norm, router_aux_loss_coef=0.0, shuffle_dataset=False, bf16=False,
        gradient_checkpointing=False, report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    prompts = [opening + template.prompt(problem.question) for problem in problems]
    data = Dataset.from_dict({"prompt": prompts, "number": list(range(len(prompts)))})
    model = load_model(config.init_from)
    trainer = GRPOTrainer(model, reward, arguments, data, None, climb.tokenizer, callbacks=[InTurn()])
    trainer.remove_callback(PrinterCallback)
    return trainer, rows


def _rewards(climb: Any, problems: Any, responses: list[str]) -> list[float]:
    """What a climb of one stage gives for responses, each to its problem, computed here and now."""
    from mai_thinking.rl.rewards import group_rewards

    mix, template = climb.collector.mix, climb.collector.responder.template
    parsed = [template.parse(text) for text in responses]
    scores = [
        0.0 if one.answer is None else mix.task(problem.task).verify(problem, one.answer)
        for problem, one in zip(problems, parsed, strict=True)
    ]
    section = climb.config.reward.model_copy(update={"w_length": 0.0})  # it does not charge for length
    thoughts = [one.thought for one in parsed]
    return [part.total for part in group_rewards(scores, thoughts, [0] * len(scores), max_length=1, section=section)[0]]


def _generate(model: Any, requests: Any, end: int | None) -> int:
    """The requests as one batch of the library's `generate`; → response tokens, padding left out."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    longest = max(len(request.prompt_ids) for request in requests)
    limits = torch.tensor([request.max_new_tokens for request in requests])

    class Limits(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.size(1) - longest >= limits

    ids, mask = torch.ones(2, len(requests), longest, dtype=torch.long)
    for row, request in enumerate(requests):
        padding = longest - len(request.prompt_ids)
        mask[row, :padding] = 0
        ids[row, padding:] = torch.tensor(request.prompt_ids)
    settings = GenerationConfig(
        max_new_tokens=int(limits.max()), do_sample=True, top_p=0.97, top_k=None, eos_token_id=end, pad_token_id=1
    )
    criteria = StoppingCriteriaList([Limits()])
    output = model.generate(ids, attention_mask=mask, generation_config=settings, stopping_criteria=criteria)
    lengths = limits
    if end is not None:
        ended = output[:, longest:] == end
        lengths = torch.where(ended.any(dim=1), torch.minimum(limits, ended.int().argmax(dim=1) + 1), limits)
    return int(lengths.sum())


def _steps(folder: Path) -> int:
    """Steps that the ledger of the run knows, computed again ones included."""
    events = folder / "events.jsonl"
    return events.read_text().count('"event": "step"') if events.exists() else 0


def _worker(launcher: int) -> int:
    """The process group of one of the launcher's workers: they lead groups of their own."""
    children = subprocess.run(["ps", "-eo", "pid,ppid,pgid"], capture_output=True, text=True).stdout.split("\n")[1:]
    rows = [tuple(map(int, line.split())) for line in children if line.strip()]
    descendants = {launcher}
    for _ in range(5):
        descendants |= {pid for pid, parent, _ in rows if parent in descendants}
    return next(pid for pid, _, group in rows if pid in descendants and pid == group and pid != launcher)


def _wait_for_steps(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while _steps(folder) < count:
        if time.monotonic() > deadline:
            raise TimeoutError("nothing happened for 300 s")
        time.sleep(0.01)


BENCHMARKS = {
    "zero-start": zero_start,
    "experts": experts,
    "checkpoint": checkpoint,
    "rollout": rollout,
    "grpo": grpo,
    "recovery": recovery,
}


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=BENCHMARKS)
    BENCHMARKS[parser.parse_args().what]()


if __name__ == "__main__":
    exit_with(main)
