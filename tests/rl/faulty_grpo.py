"""scripts/grpo.py with a SIGKILL at exact places, each once in the life of a run's folder.

`FAULTS` in the environment is a JSON list of [place, number, rank]. Places: `draw` (the n-th token drawn in this run of
the script: in mid-generation), `learn` (step n: in mid-buffer, before the update), `update` (step n: gradients are
there, weights not yet changed), `trace` (batch n of problems is generated, its traces not yet written).
"""

import json
import os
import runpy
import signal
from pathlib import Path
from typing import Any

from mai_thinking.rl.engine import BatchedEngine
from mai_thinking.rl.traces import TraceStore
from mai_thinking.training import learner

FAULTS = [tuple(fault) for fault in json.loads(os.environ["FAULTS"])]
MARKS = Path(os.environ["MARKS"])
RANK = int(os.environ.get("RANK", "0"))
now = {"draws": 0, "step": 0}


def strike(place: str, number: int) -> None:
    mark = MARKS / f"{place}-{number}-{RANK}"
    if (place, number, RANK) in FAULTS and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def patch(owner: Any, name: str, before: Any) -> None:
    original = getattr(owner, name)

    def patched(*arguments: Any, **keywords: Any) -> Any:
        before(*arguments)
        return original(*arguments, **keywords)

    setattr(owner, name, patched)


def at_draw(*_: Any) -> None:
    now["draws"] += 1
    strike("draw", now["draws"])


def at_learn(_: learner.Learner, rows: Any, loss: Any, step: int) -> None:
    now["step"] = step
    strike("learn", step)


patch(BatchedEngine, "_draw", at_draw)
patch(learner.Learner, "update", at_learn)
patch(learner, "clip_gradients", lambda *_: strike("update", now["step"]))
patch(TraceStore, "append", lambda store, batch, *_: strike("trace", batch))

runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "grpo.py"), run_name="__main__")
