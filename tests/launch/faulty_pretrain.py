"""scripts/pretrain.py with faults at exact places of exact steps, each once in the life of a run's folder.

`FAULTS` in the environment is a JSON list of {"step", "place", "rank", "how"}. Places: `between` (two micro-batches),
`update` (gradients are there, weights not yet changed), `save` (half of the checkpoint's files are written). How:
`kill`, `hang`, `tear` (cut the newest checkpoint, die, and take along what others would need to save without this
rank), or `dawdle` (go on three seconds later).
"""

import json
import os
import runpy
import signal
import time
from pathlib import Path
from typing import Any

from mai_thinking.training import learner
from mai_thinking.training.checkpoint_storage import CheckpointWriter, step_folder, visible_steps
from mai_thinking.training.learner import TextLoss
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.trainer import Trainer

FAULTS = json.loads(os.environ.get("FAULTS", "[]"))
RANK = int(os.environ.get("RANK", "0"))
now: dict[str, Any] = {"step": 0, "forwards": 0, "folder": None}


def strike(place: str, step: int) -> None:
    for number, fault in enumerate(FAULTS):
        mark = now["folder"].parent / f"struck-{number}"
        if (fault["place"], fault["step"], fault["rank"]) == (place, step, RANK) and not mark.exists():
            mark.touch()
            if fault["how"] == "dawdle":
                time.sleep(3)
                return
            if fault["how"] == "tear":
                checkpoints = now["folder"] / "checkpoints"
                file = step_folder(checkpoints, visible_steps(checkpoints)[-1]) / "rank-00001.safetensors"
                os.truncate(file, file.stat().st_size // 2)
                for own in RunFolder(now["folder"]).ranks.glob(f"rank-{RANK:05d}-*"):
                    own.unlink()
            os.kill(os.getpid(), signal.SIGSTOP if fault["how"] == "hang" else signal.SIGKILL)


def patch(owner: Any, name: str, before: Any) -> None:
    original = getattr(owner, name)

    def patched(*arguments: Any, **keywords: Any) -> Any:
        before(*arguments)
        return original(*arguments, **keywords)

    setattr(owner, name, patched)


def at_step(run: Trainer) -> None:
    now.update(step=run.step + 1, forwards=0, folder=Path(run.folder.path))


def at_forward(*_: Any) -> None:
    if now["forwards"] == 1:
        strike("between", now["step"])
    now["forwards"] += 1


def at_write(writer: CheckpointWriter, name: str, *_: Any) -> None:
    if name.endswith(".safetensors"):  # its JSON is there already
        strike("save", writer.step)


patch(Trainer, "take_step", at_step)
patch(TextLoss, "forward", at_forward)
patch(learner, "clip_gradients", lambda *_: strike("update", now["step"]))
patch(CheckpointWriter, "write_file", at_write)

runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "pretrain.py"), run_name="__main__")
