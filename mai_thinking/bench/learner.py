"""A model in training, without the run around it."""

import itertools
from collections.abc import Sequence
from typing import Any

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.run import ScheduleSection
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.training.context import make_accelerator
from mai_thinking.training.learner import Learner, TextLoss
from mai_thinking.training.model_files import build_model

LEARNING_RATE = 1e-4
"""As low as makes the routing stay what it is while it is measured."""


class BenchLearner(Learner):
    """A pre-training run's learner at a constant rate."""

    def __init__(self, config: PretrainConfig, architecture: MaiThinkingConfig) -> None:
        optimizer = config.optimizer.model_copy(update={"learning_rate": LEARNING_RATE})
        config = config.model_copy(update={"optimizer": optimizer, "schedule": ScheduleSection(shape="constant")})
        balance, z = architecture.router_aux_loss_coef, architecture.router_z_loss_coef
        super().__init__(build_model(config, architecture), config, make_accelerator(config), balance=balance, z=z)
        self.model.train()
        self._loss, self._number = TextLoss(), itertools.count(1)
        self._tokens = float(config.batch.tokens_per_step)

    def learn(self, micro_batches: Sequence[Any]) -> float:
        """One step; → tokens in it."""
        self.update(micro_batches, self._loss, next(self._number))
        return self._tokens
