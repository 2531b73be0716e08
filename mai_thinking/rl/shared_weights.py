"""The engine's weights in memory that the rollout workers share: one writer, any number of readers, and no lock that
somebody could die with."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

_NONE, _CLOSED = -1, -2


class SharedWeights:
    """Parameters and the version that they are of. Goes to another process as it is."""

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
        """None while they are being written, or are of no version."""
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
        """Load the newest; → their version. None if they were being written meanwhile, and what was loaded is torn."""
        before = self.version
        if before is None:
            return None
        load(self.parameters)
        return before if self.version == before else None
