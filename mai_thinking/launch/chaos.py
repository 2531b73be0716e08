"""Injects the faults of `mai_thinking.config.launch` into a running job, so that anyone can try a run of their own.

The moments and the victims come from a seed. A timed fault strikes once in each of its periods, counted from the job's
first step, at a moment drawn uniformly; so `kill:60s` is one a minute and yet finds the job in every state.
"""

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mai_thinking.config.launch import Fault
from mai_thinking.training.checkpoint_storage import step_folder, visible_steps
from mai_thinking.training.heartbeat import read_heartbeat

_TICK_SECONDS = 0.005


class Chaos(threading.Thread):
    """Strikes until it is stopped. `pids` gives the live workers by rank; `heartbeats` is the launcher's folder."""

    def __init__(self, faults: list[Fault], seed: int, pids: Callable[[], dict[int, int]], heartbeats: Path):
        super().__init__(name="chaos", daemon=True)
        self._seed, self._pids, self._heartbeats = seed, pids, heartbeats
        self._strikes = [(fault, iter(range(sys.maxsize if fault.period else fault.count))) for fault in faults]
        self._over = threading.Event()
        self._began: float | None = None

    def stop(self) -> None:
        """No further faults."""
        self._over.set()
        self.join()

    def run(self) -> None:
        """One thread a fault: each waits for its own occasions."""
        while (beat := read_heartbeat(self._heartbeats, 0)) is None or not beat[1]["step"]:
            if self._over.wait(_TICK_SECONDS):
                return
        self._began = time.monotonic()
        threads = [threading.Thread(target=self._strike_again_and_again, args=strike) for strike in self._strikes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _strike_again_and_again(self, fault: Fault, numbers: Iterator[int]) -> None:
        for number in numbers:
            draw = random.Random(f"{self._seed}-{fault.kind}-{number}")
            if not self._wait_for_occasion(fault, number, draw):
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

    def _wait_for_occasion(self, fault: Fault, number: int, draw: random.Random) -> bool:
        """False if the job ended first."""
        if fault.period:
            assert self._began is not None
            moment = self._began + (number + draw.random()) * fault.period
            if self._over.wait(max(0.0, moment - time.monotonic())):
                return False
        occasion = {"kill-in-save": self._saving, "torn-checkpoint": self._two_checkpoints}.get(fault.kind, self._pids)
        while not occasion():
            if self._over.wait(_TICK_SECONDS):
                return False
        return True

    def _checkpoints(self) -> Path | None:
        beat = read_heartbeat(self._heartbeats, 0)
        return Path(beat[1]["output_dir"]) / "checkpoints" if beat else None

    def _saving(self) -> bool:
        folder = self._checkpoints()
        return folder is not None and any(folder.glob("step-*.tmp")) and bool(self._pids())

    def _two_checkpoints(self) -> bool:
        """With only one, tearing it would leave nothing to go on from, and the job rightly ends."""
        folder = self._checkpoints()
        return folder is not None and len(visible_steps(folder)) >= 2 and bool(self._pids())

    def _tear_newest(self, ranks: dict[int, int], draw: random.Random) -> None:
        folder = self._checkpoints()
        assert folder is not None
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
