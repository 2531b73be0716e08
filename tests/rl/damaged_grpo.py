"""scripts/grpo.py with a policy that is damaged in mid-climb, the same on any machine.

An overlarge learning rate may as well find an answer that is always right, and what it finds hangs on rounding. So the
weights themselves are damaged: before step `AT` no token can be drawn any more that has one of the letters which
configs/tiny-grpo.yaml rewards.
"""

import re
import runpy
from pathlib import Path

import torch

from mai_thinking.training.trainer import Trainer

AT = 10  # the engine is given these weights at once, so that no gradient is taken of what others had drawn


def damage(trainer: Trainer) -> None:
    """Silence the tokens that are rewarded, and make the others so loud that none of them is drawn by chance."""
    tokenizer = trainer.recipe.tokenizer
    embedding = trainer.learner.unwrap().get_input_embeddings().weight
    rewarded = [bool(re.search("[a-m]", tokenizer.decode([token]))) for token in range(len(tokenizer))]
    with torch.no_grad():
        embedding *= 50
        embedding[: len(rewarded)][torch.tensor(rewarded)] = 0


def damaged_step(trainer: Trainer) -> None:
    """In the place of `Trainer.take_step`."""
    if trainer.step + 1 == AT:
        damage(trainer)
    take_step(trainer)


take_step = Trainer.take_step

if __name__ == "__main__":
    Trainer.take_step = damaged_step  # type: ignore[method-assign]
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "grpo.py"), run_name="__main__")
