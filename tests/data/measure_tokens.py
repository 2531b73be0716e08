"""Rows read at random from tokens on disk, by format: `measure_tokens.py MILLIONS` prints JSON. Seconds are of the
processor, the files are in the page cache, each format reads the same rows of 2,049 tokens in a process of its own.

`flat`: what preparation writes, one memory-mapped array a source, through `PreparedRows`. datatrove's token files and
Megatron's are such arrays too. `parquet`: a row a record, in row groups of 64. `mds`: Mosaic's shards of 64 MB, a row a
sample; needs `pip install mosaicml-streaming`, of which classes for images want torchvision, which nothing here uses.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

T, ROWS, GROUP = 2048, 2000, 64


def flat(folder: Path, tokens: Any) -> Callable[[int], Any]:
    """Documents of 700 tokens, in another order each epoch: rows are cut on the fly."""
    from mai_thinking.data.packing import PreparedRows
    from mai_thinking.data.prepared import PreparedSource, save_source

    if not (folder / "a.tokens.npy").exists():
        offsets = np.append(np.arange(0, len(tokens), 700), len(tokens))
        save_source(folder, "a", [tokens], offsets, map(str, range(len(offsets) - 1)))
    rows = PreparedRows("a", PreparedSource.load(folder, "a"), context_length=T, seed=0)
    return lambda k: rows.row(k).tokens


def parquet(folder: Path, tokens: Any) -> Callable[[int], Any]:
    """A row group is read for a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not (folder / "a.parquet").exists():
        offsets = np.arange(0, len(tokens), T).astype(np.int32)
        table = pa.table({"tokens": pa.ListArray.from_arrays(offsets, tokens)})
        pq.write_table(table, folder / "a.parquet", row_group_size=GROUP)
    file = pq.ParquetFile(folder / "a.parquet", memory_map=True)
    return lambda k: file.read_row_group(k // GROUP).column(0)[k % GROUP].values.to_numpy()


def mds(folder: Path, tokens: Any) -> Callable[[int], Any]:
    """A sample is found by the index that the shards have."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    from streaming import LocalDataset, MDSWriter

    if not (folder / "index.json").exists():
        with MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}, exist_ok=True) as writer:
            for start in range(0, len(tokens) - T, T):
                writer.write({"tokens": tokens[start : start + T + 1]})
    rows = LocalDataset(str(folder))
    return lambda k: rows[k]["tokens"]


def measure(name: str, folder: Path, count: int) -> dict[str, float]:
    """Write it in a process that ends, then read it."""
    make: Callable[[Path, Any], Callable[[int], Any]] = globals()[name]
    written = (folder / "written").exists()
    rows = make(folder, None if written else np.random.default_rng(0).integers(0, 4096, count).astype(np.uint16))
    if not written:
        (folder / "written").touch()
        return {}
    order = np.random.default_rng(1).integers(0, count // T - 1, ROWS).tolist()
    rows(0)
    before, begin = _anonymous(), time.process_time()
    for k in order:
        rows(k).astype(np.int64)
    seconds = time.process_time() - begin
    size = sum(path.stat().st_size for path in folder.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"rows_per_s": ROWS / seconds, "mb": size / 1e6, "grew_mb": _anonymous() - before, "peak_mb": peak}


def _anonymous() -> float:
    """Megabytes of memory that no file is behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1e3


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[1]) * 10**6)))
        sys.exit()
    found = {"mb": 2 * float(sys.argv[1])}
    for one in ("flat", "parquet", "mds"):
        with tempfile.TemporaryDirectory() as where:
            command = [sys.executable, __file__, sys.argv[1], one, where]
            for _ in range(2):
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ, check=False)
            found[one] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None  # type: ignore
    print(json.dumps(found))
