"""A model in training, without the run around it."""

import itertools

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.run import ScheduleSection
from mai_thinking.data import Batch, Loader, PreparedData
from mai_thinking.model.configuration import LOCAL
from mai_thinking.training.context import make_accelerator
from mai_thinking.training.learner import Learner
from mai_thinking.training.model_files import build_model, model_config
from mai_thinking.training.text_loss import TextLoss

LEARNING_RATE = 1e-4
"""As low as makes the routing stay what it is while it is measured."""


class BenchLearner(Learner):
    """A pre-training run's learner at a constant rate, on data that is already prepared."""

    def __init__(self, config: PretrainConfig, data: PreparedData, *, local_layers_alone: bool = False) -> None:
        optimizer = config.optimizer.model_copy(update={"learning_rate": LEARNING_RATE})
        config = config.model_copy(update={"optimizer": optimizer, "schedule": ScheduleSection(shape="constant")})
        architecture = model_config(config, data.tokenizer)
        if local_layers_alone:  # which no config may have: a period ends with a global layer
            architecture.layer_types = [LOCAL] * architecture.num_hidden_layers
        super().__init__(
            build_model(config, architecture),
            config,
            make_accelerator(config),
            balance=architecture.router_aux_loss_coef,
            z=architecture.router_z_loss_coef,
        )
        self.model.train()
        self._loss, self._number = TextLoss(), itertools.count(1)
        self._tokens = float(config.batch.tokens_per_step)

    def learn(self, batch: Batch) -> float:
        """One step; → tokens in it."""
        self.update(batch.micro_batches, self._loss, next(self._number))
        return self._tokens


def loading(config: PretrainConfig, data: PreparedData, *, prefetch: int = 4) -> Loader:
    """`config`'s loader, for one rank; a context, which ends its thread."""
    return Loader(
        data,
        context_length=config.batch.context_length,
        micro_batch_size=config.batch.micro_batch_size,
        rows_per_step=config.batch.global_batch_size,
        seed=config.seed,
        prefetch=prefetch,
    )
