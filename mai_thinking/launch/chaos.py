"""Injects the faults of `mai_thinking.config.launch` into a running job, so that anyone can try a run of their own.

The moments and the victims come from a seed. A timed fault strikes once in each of its periods, counted from the job's
first step, at a moment drawn uniformly; so `kill:60s` is one a minute and yet finds the job in every state.
"""

import contextlib
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mai_thinking.config.launch import Fault
from mai_thinking.training.checkpoint_storage import step_folder, visible_steps

_TICK_SECONDS = 0.005


class Chaos(threading.Thread):
    """Strikes until it is stopped. `pids` gives the live workers by rank, `beat` rank 0's last heartbeat."""

    def __init__(
        self,
        faults: list[Fault],
        seed: int,
        pids: Callable[[], dict[int, int]],
        beat: Callable[[], tuple[float, dict[str, Any]] | None],
    ):
        super().__init__(name="chaos", daemon=True)
        self._faults, self._seed, self._pids, self._beat = faults, seed, pids, beat
        self._over = threading.Event()

    def stop(self) -> None:
        """No further faults."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """One thread a fault: each waits for its own occasions."""
        if not self._wait_until(lambda: (beat := self._beat()) is not None and beat[1]["step"]):
            return
        began = time.monotonic()
        threads = [threading.Thread(target=self._strike_again_and_again, args=(f, began)) for f in self._faults]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _strike_again_and_again(self, fault: Fault, began: float) -> None:
        occasions = {"kill-in-save": self._saving, "torn-checkpoint": self._two_checkpoints}
        for number in itertools.count() if fault.period else range(fault.count):
            draw = random.Random(f"{self._seed}-{fault.kind}-{number}")
            moment = began + (number + draw.random()) * fault.period
            if self._over.wait(max(0.0, moment - time.monotonic())):
                return
            if not self._wait_until(lambda: self._pids() and occasions.get(fault.kind, lambda: True)()):
                return
            ranks = self._pids()
            victim = draw.choice(sorted(ranks))
            self._log(f"{fault.kind} number {number + 1}, rank {victim}")
            match fault.kind:
                case "kill" | "kill-in-save":
                    _signal_group(ranks[victim], signal.SIGKILL)
                case "hang":
                    _signal_group(ranks[victim], signal.SIGSTOP)
                case "term":
                    os.kill(os.getpid(), signal.SIGTERM)
                case "torn-checkpoint":
                    self._tear_newest(ranks, draw)

    def _wait_until(self, occasion: Callable[[], object]) -> bool:
        """False if the job ended first."""
        while not occasion():
            if self._over.wait(_TICK_SECONDS):
                return False
        return True

    @property
    def _checkpoints(self) -> Path:
        beat = self._beat()
        return Path(beat[1]["output_dir"], "checkpoints") if beat else Path(os.devnull)

    def _saving(self) -> bool:
        return any(self._checkpoints.glob("step-*.tmp"))

    def _two_checkpoints(self) -> bool:
        """With only one, tearing it would leave nothing to go on from, and the job rightly ends."""
        return len(visible_steps(self._checkpoints)) >= 2

    def _tear_newest(self, ranks: dict[int, int], draw: random.Random) -> None:
        folder = self._checkpoints
        for pid in ranks.values():  # first, so that what is newest now stays the newest
            _signal_group(pid, signal.SIGKILL)
        newest = step_folder(folder, visible_steps(folder)[-1])
        file = draw.choice(sorted(newest.iterdir()))
        os.truncate(file, file.stat().st_size // 2)
        self._log(f"cut {file} in half")

    def _log(self, text: str) -> None:
        print(f"chaos: {text}", file=sys.stderr, flush=True)


def _signal_group(pid: int, name: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it died by itself in the meantime
        os.killpg(pid, name)
