"""A rollout worker as a process of its own: an engine with graders, which answers the batches that it is sent.

It takes newer weights between two decoding steps, without stopping what it decodes, unless the batch is for one version
alone: that is given up when the weights are no longer that version's.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from torch import nn
from transformers.utils import logging

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.data.tokenizer import load_tokenizer
from mai_thinking.rl.grading import GradingPool
from mai_thinking.rl.policy_model import check_lengths, make_engine, policy_config, policy_model
from mai_thinking.rl.rollout_worker import RolloutBatch, RolloutWorker
from mai_thinking.rl.schedule import Spool
from mai_thinking.rl.tasks import TaskSampler
from mai_thinking.training.process import keep_freed_memory

_PAUSE = 0.002
_NONE, _CLOSED = -1, -2


class NewestWeights(Protocol):
    """What a worker reads."""

    @property
    def version(self) -> int | None:
        """None while they are being written, or are of no version."""

    def read(self, load: Callable[[Iterable[torch.Tensor]], None]) -> int | None:
        """Load the newest; → their version. None if they were being written meanwhile, and what was loaded is torn."""


class SharedWeights(NewestWeights):
    """The engine's parameters in memory that the workers share, and the version that they are of: one writer, any
    number of readers, and no lock that somebody could die with. Goes to another process as it is."""

    def __init__(self, model: nn.Module) -> None:
        """Moves `model`'s parameters, on the CPU, into shared memory; it goes on using them."""
        parameters = list(model.parameters())
        shared = torch.empty(sum(p.numel() for p in parameters), dtype=parameters[0].dtype).share_memory_()
        self.parameters = []
        for parameter, part in zip(parameters, shared.split([p.numel() for p in parameters]), strict=True):
            part.copy_(parameter.detach().view(-1))
            parameter.data = part.view_as(parameter)
            self.parameters.append(parameter.data)
        self._version = torch.full((), _NONE, dtype=torch.int64).share_memory_()

    @property
    def version(self) -> int | None:
        version = int(self._version)
        return None if version < 0 else version

    @property
    def closed(self) -> bool:
        """Whether nobody is to read any more."""
        return int(self._version) == _CLOSED

    def close(self) -> None:
        """For good."""
        self._version.fill_(_CLOSED)

    def retract(self) -> None:
        """Before they are written: nobody begins to read."""
        self._version.fill_(_NONE)

    def publish(self, version: int) -> None:
        """After they were written."""
        self._version.fill_(version)

    def read(self, load: Callable[[Iterable[torch.Tensor]], None]) -> int | None:
        before = self.version
        if before is None:
            return None
        load(self.parameters)
        return before if self.version == before else None


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker is told at its start."""

    config: dict[str, Any]
    ranks: int
    weights: SharedWeights
    spool: Spool
    beats: torch.Tensor  # [workers] float64: when each last moved, by the monotonic clock
    threads: int


class GivenUp(BaseException):
    """The weights that a batch is for are gone. No error: no generation is tried again for it."""


class Answering(AbstractContextManager["Answering"]):
    """An engine with graders, which answers batches from weights that change while it does."""

    def __init__(
        self, fields: dict[str, Any], ranks: int, threads: int, weights: NewestWeights, beat: Callable[[], None]
    ) -> None:
        """`fields` of a `GrpoConfig`. `beat` is called whenever this worker moves."""
        keep_freed_memory()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        config = GrpoConfig.model_validate(fields)
        tokenizer = load_tokenizer(config.init_from)
        mix = TaskSampler(config.tasks, config.seed)
        check_lengths(config, mix)
        model, _ = policy_model(config, policy_config(config))
        self._engine = make_engine(model, config, tokenizer, "no", self._between_tokens)
        self._pool = GradingPool(config.tasks, **config.grading.model_dump())
        self._worker = RolloutWorker(config, mix, self._engine, self._pool, tokenizer, ranks=ranks)
        self._newest, self._beat, self._version = weights, beat, -1
        self._only: int | None = None  # As the batch says
        self._steps, self._switches = 0, list[tuple[int, int]]()

    def answer(self, asked: RolloutBatch) -> RolloutBatch | None:
        """The batch with its answer; None if the weights that it is for are gone."""
        self._only, self._steps, self._switches = asked.only, 0, []
        self._beat()
        try:
            while self._version < 0 or self._only not in (None, self._version):
                self._check()
                self._load()
            if self._newest.version not in (None, self._version):
                self._load()
            batch = self._worker.answer(asked, self._version)
            batch.switches = self._switches
            self._check()
        except GivenUp:
            return None
        self._beat()
        return batch

    def __exit__(self, *error: object) -> None:
        self._pool.close()

    def _between_tokens(self) -> None:
        """Take newer weights, if there are any."""
        self._beat()
        self._check()
        self._steps += 1
        if self._newest.version not in (None, self._version):
            self._load()
            self._switches.append((self._steps, self._version))

    def _check(self) -> None:
        """GivenUp if nobody wants the batch any more."""
        if self._only not in (None, self._newest.version):
            raise GivenUp

    def _load(self) -> None:
        """The newest, whole."""
        while (version := self._newest.read(self._engine.load_parameters)) is None:
            self._beat()
            self._check()
            time.sleep(_PAUSE)
        self._version = version


def work(setup: WorkerSetup, worker: int, connection: Connection) -> None:
    """Answer batches until the other end closes. For each sends its number and None, or what went wrong for good."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for the trainer, which ends this one
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def beat() -> None:
        """Say that this worker moves; end with the trainer, with which the fork server goes, or when it says so: of a
        trainer that is gone, the next one's workers write the batch."""
        setup.beats[worker] = time.monotonic()
        if os.getppid() != parent or setup.weights.closed:
            sys.exit()

    with Answering(setup.config, setup.ranks, setup.threads, setup.weights, beat) as answering:
        while True:
            try:
                asked = connection.recv()
            except (EOFError, OSError):  # nobody is there any more
                return
            outcome = None
            try:
                if batch := answering.answer(asked):
                    batch.worker = worker
                    setup.spool.write(batch)
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            connection.send((asked, outcome))
