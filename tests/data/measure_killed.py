"""A preparation of much text that is killed ten times: `measure_killed.py MB` prints JSON.

The text is that of `measure_speed`, every stage on, but in as many processes as there are cores; the whole group is
killed when it has written a number of files that is drawn by chance, and the same command is given again. The last one
goes to its end. The files should be those of `measure_speed`, which was not killed, and used other processes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from measure_speed import EVERYTHING, corpus

from mai_thinking.data import prepare

KILLS, STAGES = 10, 10
"""About so many stages leave a file for each shard."""


def measure(megabytes: float) -> dict[str, Any]:
    """The checksums of what is there in the end, and in which stage each kill came."""
    config, folder = corpus(megabytes, EVERYTHING)
    work, seen, killed = folder / "cache", set[Path](), list[str]()
    for target in [*sorted(random.Random(0).sample(range(1, int(megabytes / 32 * STAGES)), KILLS)), 10**9]:
        command = [sys.executable, __file__, str(megabytes), "child"]
        child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        while child.poll() is None:
            with suppress(FileNotFoundError):  # of a folder that goes while it is read
                seen.update(work.glob(".*.work/*/*.np?"))
            if len(seen) >= target:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                newest = max(work.glob(".*.work/*"), key=lambda path: path.stat().st_mtime, default=work)
                killed.append(newest.name)
            time.sleep(0.05)
        if child.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"the preparation ended with {child.returncode}")
    data = prepare(config)
    return {"mb": megabytes, "killed_in": killed, "processes": len(os.sched_getaffinity(0)),
            "files": {name: file["xxh3"] for name, file in data.manifest["files"].items()}}  # fmt: skip


if __name__ == "__main__":
    if sys.argv[2:]:
        prepare(corpus(float(sys.argv[1]), EVERYTHING)[0])
    else:
        print(json.dumps(measure(float(sys.argv[1]))))
