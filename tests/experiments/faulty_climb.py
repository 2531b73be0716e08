"""scripts/climb.py with a SIGKILL at exact places, each once in the life of a climb's folder.

`FAULTS` in the environment is a JSON list of [place, stage, step, rank]. Places: `step` (the stage's step is done, its
checkpoint not yet written), `begin` (what the stage begins with is written down, nothing of it run), `end` (its last
step is saved, its model is not).
"""

import json
import os
import runpy
import signal
from pathlib import Path
from typing import Any

from mai_thinking.experiments.plan import ClimbPlan
from mai_thinking.training.ledger import GoodputLedger
from mai_thinking.training.trainer import Trainer

FAULTS = [tuple(fault) for fault in json.loads(os.environ["FAULTS"])]
MARKS = Path(os.environ["MARKS"])
RANK = int(os.environ.get("RANK", "0"))


def strike(place: str, stage: str, step: int) -> None:
    mark = MARKS / f"struck-{place}-{stage}-{step}-{RANK}"
    if (place, stage, step, RANK) in FAULTS and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def patch(owner: Any, name: str, after: Any) -> None:
    original = getattr(owner, name)

    def patched(*arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        after(*arguments)
        return result

    setattr(owner, name, patched)


def at_save(trainer: Trainer) -> None:
    if trainer.step == trainer.config.steps:
        strike("end", trainer.config.name, trainer.step)


patch(GoodputLedger, "step", lambda ledger, step, *_: strike("step", ledger.path.parent.name, step))
patch(ClimbPlan, "remember_inputs", lambda _, stage: strike("begin", stage.name, 0))
patch(Trainer, "save", at_save)

runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "climb.py"), run_name="__main__")
