"""A small run's losses, gradient norms and weights, exactly as they were recorded.

Exact numbers hold for one processor model, one release of PyTorch and of transformers; `golden/*.json` has a file for
each combination on which somebody recorded them. Elsewhere the losses are compared with any record, loosely.

To accept an intended change, or to record a new machine: `python tests/test_golden.py`, and say in the commit message
why the numbers changed.
"""

import hashlib
import json
import platform
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.pretraining import pretrain
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model

HERE = Path(__file__).parent
Golden = dict[str, Any]


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


def golden_run(folder: Path) -> Golden:
    write_corpus(folder / "corpus.jsonl")
    source = "{name: made-up, kind: jsonl, category: general, licence: MIT, provenance: procedural, weight: 1"
    overrides = [
        f"output_dir={folder / 'run'}",
        f"data.cache_dir={folder / 'cache'}",
        f"data.sources=[{source}, path: {folder / 'corpus.jsonl'}}}]",
        "batch.micro_batch_size=4",
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads decides the order of some sums
    try:
        assert pretrain(load_config(PretrainConfig, HERE.parent / "configs" / "tiny.yaml", overrides)) == 0
    finally:
        torch.set_num_threads(threads)
    records = read_records(folder / "run" / "metrics.jsonl")
    weights = hashlib.sha256()
    for name, value in sorted(load_model(folder / "run" / "final").state_dict().items()):
        weights.update(name.encode() + value.numpy().tobytes())
    steps = [record for record in records if "kind" not in record]
    return {
        "losses": [record["loss"].hex() for record in steps],
        "grad_norms": [record["grad_norm"].hex() for record in steps],
        "balance_losses": [record["balance_loss"].hex() for record in steps],
        "bits_per_byte": [record["bits_per_byte"].hex() for record in records if record.get("kind") == "evaluation"],
        "weights": weights.hexdigest(),
    }


def test_golden_run(tmp_path: Path) -> None:
    result = golden_run(tmp_path)
    if record_file().exists():
        recorded = json.loads(record_file().read_text())["run"]
        assert result == recorded, "the numbers changed; if that was meant, see this file's docstring"
    else:
        recorded = json.loads(min((HERE / "golden").glob("*.json")).read_text())["run"]
        losses, before = ([float.fromhex(x) for x in run["losses"]] for run in (result, recorded))
        assert losses == pytest.approx(before, rel=1e-3)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as name:
        golden = {"machine": machine(), "run": golden_run(Path(name))}
    record_file().parent.mkdir(exist_ok=True)
    record_file().write_text(json.dumps(golden, indent=1) + "\n")
    print(f"recorded {record_file()}")
