"""From a worker's death to the next step: from warm workers, and from a cold start of the same run."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mai_thinking.bench.options import Options
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure, Turn, ratio
from mai_thinking.config.shipped import SCRIPTS


def measure(options: Options) -> Result:
    """Kill a worker of a two-worker nano run; the same run is then started cold. Seconds to the next whole step."""
    warm: list[float] = []
    cold: list[float] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name) / "run"
        run = [str(SCRIPTS / "pretrain.py"), "configs/nano.yaml", f"output_dir={folder}", "checkpoint.every=20"]
        command = [sys.executable, str(SCRIPTS / "launch.py"), "--nproc", "2", *run]
        for number in range(max(2, options.rounds // 4)):
            begin = time.monotonic()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                before = _steps(folder)
                _wait_for_steps(folder, before + 1)
                if number:
                    cold.append(time.monotonic() - begin)
                _wait_for_steps(folder, before + 25)
                before, begin = _steps(folder), time.monotonic()
                os.kill(_worker(process.pid), signal.SIGKILL)
                _wait_for_steps(folder, before + 1)
                warm.append(time.monotonic() - begin)
            finally:
                process.terminate()
                process.wait()
    pairs = [[Turn(seconds, 1.0) for seconds in taken] for taken in (cold, warm[1:])]
    figures = {"warm": Figure.of(warm, "s"), "cold": Figure.of(cold, "s"), "cold / warm": ratio(*pairs)}
    return Result("recovery", [Row({"run": "nano, two workers"}, figures)])


def _steps(folder: Path) -> int:
    """Steps that the ledger of the run knows, computed again ones included."""
    events = folder / "events.jsonl"
    return events.read_text().count('"event": "step"') if events.exists() else 0


def _worker(launcher: int) -> int:
    """A process of one of the launcher's workers: they lead process groups of their own."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,pgid"], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in listing.splitlines()[1:] if line.strip()]
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
