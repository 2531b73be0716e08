"""How a run is asked to stop, and how it waits for the one before."""

import contextlib
import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

SAVERS_VARIABLE = "MAI_SAVERS"
"""The launcher tells a restarted worker in this environment variable which processes of the attempt before still save
the run; it ends them when they have."""


def wait_for_savers() -> None:
    """Until those ranks of the attempt before that save the run have done so and are gone, with all their locks."""
    for pid in os.environ.pop(SAVERS_VARIABLE, "").split():
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(int(pid), 0)
                time.sleep(0.005)


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGHUP into a question that all ranks answer alike at the end of a step. Constructing
    one is collective where torch.distributed is initialised. A second signal, a second or more after the first, is not
    taken for an echo of it: the process ends at once. One made within another knows what that was asked for, and when
    it is closed tells it what came since: no signal is lost between two runs of one process."""

    def __init__(self) -> None:
        holder = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        self._outer: StopRequest | None = holder if isinstance(holder, StopRequest) else None
        self.requested: bool = self._outer is not None and self._outer.requested
        """Whether a signal has reached this rank."""
        self._when: float = self._outer._when if self._outer else 0.0
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None
        # `nohup` has a run ignore that its terminal is gone.
        hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
        self._before = {name: signal.signal(name, self._take) for name in (signal.SIGTERM, signal.SIGINT, *hangup)}

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective, once after each step: all ranks stop after the same one."""
        if self._group is None:
            return self.requested
        flag = torch.tensor(int(self.requested))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for name, handler in self._before.items():
            signal.signal(name, handler)
        if self._outer is not None and self.requested:
            self._outer.requested, self._outer._when = True, self._when

    def _take(self, name: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._when > 1:
            self.close()
            raise KeyboardInterrupt
        if not self.requested:
            self._when = time.monotonic()
        self.requested = True
