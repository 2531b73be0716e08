"""Measurements that the README quotes: `python scripts/bench.py WHAT`, each alternating its sides in one run.

zero-start   expert load at initialisation, attention's output gains ordinary or zero
experts      our expert computation against the library's, forward and backward
checkpoint   what saving costs the loop, asynchronously and synchronously
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

from mai_thinking.config.command import exit_with
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "configs" / "nano.yaml"


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
    from mai_thinking.pretraining import Pretraining, make_accelerator
    from mai_thinking.training.run_folder import RunFolder

    with tempfile.TemporaryDirectory(dir=ROOT) as name, contextlib.ExitStack() as stack:
        config = load_config(PretrainConfig, NANO, [f"output_dir={name}/run", "steps=10000"])
        folder = RunFolder(config.folder)
        run = stack.enter_context(
            contextlib.closing(Pretraining(config, folder, make_accelerator(config, folder), stack))
        )
        cost: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
        steps: list[float] = []
        for batch in run.loader:
            begin = time.perf_counter()
            run._train(batch)
            steps.append(time.perf_counter() - begin)
            run.checkpointer.due(run.step)
            if run.step % 10 == 0:
                synchronous = run.step // 10 % 2 == 0
                stall = run.checkpointer.save(run.step, run._state(), synchronous=synchronous)
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


BENCHMARKS = {"zero-start": zero_start, "experts": experts, "checkpoint": checkpoint, "recovery": recovery}


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=BENCHMARKS)
    BENCHMARKS[parser.parse_args().what]()


if __name__ == "__main__":
    exit_with(main)
