"""A model in training, without the run around it."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import Batch, Loader, PreparedData
from mai_thinking.model.configuration import LOCAL
from mai_thinking.training.model_files import apply_compile_and_checkpointing, build_model, model_config
from mai_thinking.training.optimizer import build_optimizer
from mai_thinking.training.parallel import parallelize
from mai_thinking.training.run_folder import RunFolder
from mai_thinking.training.session import make_accelerator
from mai_thinking.training.step import TrainStep

LEARNING_RATE = 1e-4
"""As low as makes the routing stay what it is while it is measured."""


class Learner:
    """`config`'s model, optimiser and step, on data that is already prepared."""

    def __init__(self, config: PretrainConfig, data: PreparedData, *, local_layers_alone: bool = False) -> None:
        self.config = config
        architecture = model_config(config, data.tokenizer)
        if local_layers_alone:  # which no config may have: a period ends with a global layer
            architecture.layer_types = [LOCAL] * architecture.num_hidden_layers
        accelerator = make_accelerator(config, RunFolder(config.folder))
        model = build_model(config, architecture)
        apply_compile_and_checkpointing(model, config.execution)
        parallel = parallelize(model, accelerator, "ddp")
        self.model = parallel.model.train()
        self.whole = parallel.unwrap()
        self._optimizer = build_optimizer(parallel.model, config.optimizer)
        self._step = TrainStep.of_pretraining(parallel, self._optimizer, config, architecture)
        self._number = itertools.count(1)

    def learn(self, batch: Batch) -> float:
        """One step; → tokens in it."""
        self._step(batch.micro_batches, LEARNING_RATE, next(self._number))
        return float(self.config.batch.tokens_per_step)

    def forget_gradients(self) -> None:
        """Of a step that failed."""
        self._optimizer.zero_grad(set_to_none=True)


@contextmanager
def loading(config: PretrainConfig, data: PreparedData, *, prefetch: int = 4) -> Iterator[Loader]:
    """`config`'s loader, for one rank."""
    with ExitStack() as stack:
        yield stack.enter_context(
            Loader(
                data,
                context_length=config.batch.context_length,
                micro_batch_size=config.batch.micro_batch_size,
                rows_per_step=config.batch.global_batch_size,
                seed=config.seed,
                prefetch=prefetch,
            )
        )
