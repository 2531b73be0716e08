"""Small runs of every loop: their losses, gradient norms and weights, exactly as they were recorded.

Pre-training on a made-up language, mid-training from it, GRPO from that base, self-distillation on its traces; then all
four as two ranks, stopped after a step and gone on with. On one rank a run that is stopped gives the same bits as one
that is not.

Exact numbers hold for one processor model, one release of PyTorch and of transformers; `golden/*.json` has a file for
each combination on which somebody recorded them. Elsewhere the losses of pre-training are compared with any record,
loosely.

To accept an intended change, or to record a new machine: `python tests/test_golden.py`, and say in the commit message
why the numbers changed.
"""

import contextlib
import hashlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.recipes.distill import self_distill
from mai_thinking.recipes.grpo import grpo
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.metrics import MetricsLog, read_records
from mai_thinking.training.model_files import load_model
from ranks import run_ranks

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
Golden = dict[str, Any]
STEP_VALUES = ("loss", "grad_norm", "balance_loss", "reward", "pass_rate", "entropy", "clip_relaxation", "mismatch")
EVALUATION_VALUES = ("bits_per_byte", "pass@1")


def machine() -> dict[str, str]:
    """What exact numbers depend on."""
    # Virtual machines may call very different processors by one name; family, model and stepping tell them apart.
    wanted = ("model name", "cpu family", "model", "stepping")
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        fields = {name.strip(): value.strip() for name, value in reversed(lines)}
        cpu = " ".join(fields[name] for name in wanted)
    except (OSError, KeyError):
        cpu = platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu": f"{cpu} ({capability})", "torch": torch.__version__, "transformers": transformers.__version__}


def record_file() -> Path:
    return HERE / "golden" / f"{hashlib.sha256(json.dumps(machine()).encode()).hexdigest()[:12]}.json"


def write_corpus(path: Path) -> None:
    """Text that depends on no version of anything: sentences of a made-up language with some regularity."""
    draw = random.Random(11)
    words = ["".join(draw.choices("abdegiklmnoprstu", k=draw.randint(2, 8))) for _ in range(300)]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=120))}) for _ in range(80)]
    path.write_text("\n".join(lines) + "\n")


def runs(folder: Path, base: Path, climbed: Path) -> dict[str, Callable[[], int]]:
    """Each loop's run, at `folder`/NAME: pre-training, then three from `base`, the last on the traces of `climbed`."""
    source = "{name: made-up, kind: jsonl, category: general, licence: MIT, provenance: procedural, weight: 1"
    place = base.parent
    data = [f"data.sources=[{source}, path: {place / 'corpus.jsonl'}}}]", f"data.cache_dir={place / 'cache'}"]
    origin = f"init_from={base / 'final'}"

    def start(run: Callable[[Any], int], config: type[Any], file: str, name: str, *overrides: str) -> Callable[[], int]:
        changes = [f"output_dir={folder / name}", "checkpoint.every=100", *overrides]
        return lambda: run(load_config(config, CONFIGS / file, changes))

    longer = ["batch.context_length=96", "evaluation.every=2", "schedule.warmup_steps=1", "steps=4"]
    longer.append("execution.activation_checkpointing=true")  # with it, the balance loss is exact over micro-batches
    learned = [*data, f"data.tokenizer={{path: {base / 'final'}}}", origin, *longer]
    traces = f"traces=[{{run: {climbed}, late: 1.0}}]"
    return {
        "pretrain": start(pretrain, PretrainConfig, "tiny.yaml", "pretrain", *data),
        "midtrain": start(pretrain, PretrainConfig, "tiny.yaml", "midtrain", *learned),
        "grpo": start(grpo, GrpoConfig, "tiny-grpo.yaml", "grpo", origin, "steps=4"),
        "distill": start(self_distill, DistillConfig, "tiny-distill.yaml", "distill", origin, traces, "steps=4"),
    }


def result_of(run: Path) -> Golden:
    """What must stay as it is, of a finished run."""
    records = read_records(run / "metrics.jsonl")
    weights = hashlib.sha256()
    for name, value in sorted(load_model(run / "final").state_dict().items()):
        weights.update(name.encode() + value.numpy().tobytes())
    steps = [record for record in records if "kind" not in record]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    result: Golden = {"steps": len(steps), "weights": weights.hexdigest()}
    for names, among in ((STEP_VALUES, steps), (EVALUATION_VALUES, evaluations)):
        for name in names:
            if values := [float(record[name]).hex() for record in among if name in record]:
                result[name] = values
    return result


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The number of threads decides the order of some sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """SIGTERM for the process that writes the record of `step`, once it is written."""
    append = MetricsLog.append

    def appended(self: MetricsLog, record: dict[str, Any], **options: Any) -> bool:
        written = append(self, record, **options)
        if written and record["step"] == step and "kind" not in record:
            os.kill(os.getpid(), signal.SIGTERM)
        return written

    MetricsLog.append = appended  # type: ignore[method-assign]
    try:
        yield
    finally:
        MetricsLog.append = append  # type: ignore[method-assign]


def stop_and_go_on(start: Callable[[], int]) -> None:
    with stopped_after(2):
        assert start() == 75
    assert start() == 0


def as_a_rank(rank: int, folder: Path, base: Path, climbed: Path) -> None:
    """All four loops, each stopped after its second step and gone on with."""
    for start in runs(folder, base, climbed).values():
        stop_and_go_on(start)


def golden_runs(folder: Path) -> dict[str, Golden]:
    """Every loop's results, on one rank and on two."""
    write_corpus(folder / "corpus.jsonl")
    base, climbed = folder / "pretrain", folder / "grpo"
    with one_thread():
        for start in runs(folder, base, climbed).values():
            assert start() == 0
    (folder / "two-ranks").mkdir()
    run_ranks(2, as_a_rank, folder / "two-ranks", base, climbed, timeout=280)
    places = [folder, folder / "two-ranks"]
    return {str((p / name).relative_to(folder)): result_of(p / name) for p in places for name in runs(p, base, climbed)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Golden]]:
    folder = tmp_path_factory.mktemp("golden")
    return folder, golden_runs(folder)


LOOPS = ("pretrain", "midtrain", "grpo", "distill")


@pytest.mark.parametrize("name", [*LOOPS, *(f"two-ranks/{name}" for name in LOOPS)])
def test_the_bits_are_as_recorded(results: tuple[Path, dict[str, Golden]], name: str) -> None:
    result = results[1][name]
    if record_file().exists():
        recorded = json.loads(record_file().read_text())["runs"]
        if name in recorded:
            assert {what: result[what] for what in recorded[name]} == recorded[name], (
                "the numbers changed; if that was meant, see this file's docstring"
            )
    elif name == "pretrain":
        recorded = json.loads(min((HERE / "golden").glob("*.json")).read_text())["runs"]["pretrain"]
        losses, before = ([float.fromhex(x) for x in run["loss"]] for run in (result, recorded))
        assert losses == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("name", LOOPS[1:])
def test_a_run_that_was_stopped_gives_the_same_bits(
    results: tuple[Path, dict[str, Golden]], tmp_path: Path, name: str
) -> None:
    folder, undisturbed = results
    with one_thread():
        stop_and_go_on(runs(tmp_path, folder / "pretrain", folder / "grpo")[name])
    assert result_of(tmp_path / name) == undisturbed[name]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as name:
        golden = {"machine": machine(), "runs": golden_runs(Path(name))}
    record_file().parent.mkdir(exist_ok=True)
    record_file().write_text(json.dumps(golden, indent=1) + "\n")
    print(f"recorded {record_file()}")
