"""What goodput to expect elsewhere: measured costs and a failure rate in, an event simulation out.

A run works in cycles of `every` steps and a save. A fault costs a restart, and throws the run back to the newest
committed checkpoint unless a rank that is left saves (`JitCheckpoint`). The interval between saves that is proposed is
that of J. W. Young, "A first order approximation to the optimum checkpoint interval" (CACM 1974).
"""

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from mai_thinking.errors import UsageError
from mai_thinking.launch.goodput import Account
from mai_thinking.training.checkpoint_storage import MANIFEST, read_manifest, step_folder, visible_steps
from mai_thinking.training.ledger import CHECKPOINT, DATA, EVALUATION, OTHER, PRODUCTIVE, SLOW, START_UP
from mai_thinking.training.metrics import read_records

FAILURES_PER_GPU_HOUR = 419 / (54 * 24 * 16_384)
"""Llama 3's pre-training: 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783, §3.3.4): one in
50,700 GPU-hours."""


class Costs(NamedTuple):
    """What a run's parts take, in seconds."""

    ideal_step: float
    """A step at the run's own best throughput."""
    step: float
    """A step as they come, with waits for data and what lies between steps."""
    evaluation: float
    """Evaluations, spread over the steps."""
    stall: float
    """For which a save holds up the loop."""
    commit: float
    """From the end of the stall until the checkpoint is one."""
    restart: float
    """From a fault to the beginning of the first whole step."""
    rescued: float
    """The share of faults after which a rank that was left saved, so that no whole step was lost."""
    start_up: float
    """From the launch to the beginning of the first step."""

    @property
    def cadence(self) -> float:
        """Seconds from one step to the next, but for saves and faults."""
        return self.step + self.evaluation


def measure(run: Path) -> Costs:
    """The costs of a run that had at least one fault, from its ledger and its checkpoints."""
    events = read_records(run / "events.jsonl")
    result = Account(events)
    if not result.steps or not result.recoveries or not result.saves:
        had = f"{result.steps} steps, {len(result.saves)} saves and {len(result.recoveries)} restarts"
        raise UsageError(f"{run}: {had}; measure on a run with each, as under `scripts/launch.py --chaos kill:60s`")
    kept, seconds = result.steps, result.seconds
    # The recomputed steps' share of data waits is small, and is left with the kept ones.
    step = sum(seconds[name] for name in (PRODUCTIVE, SLOW, DATA, OTHER)) / kept
    return Costs(
        ideal_step=result.best_step_seconds,
        step=step,
        evaluation=seconds[EVALUATION] / kept,
        stall=mean(result.saves),
        commit=_commit_seconds(run, events),
        # A recovery ends with a whole step, and begins with what the fault left of one: half, on average.
        restart=mean(result.recoveries) - 1.5 * step,
        rescued=result.rescued / len(result.recoveries),
        start_up=seconds[START_UP],
    )


def _commit_seconds(run: Path, events: list[dict]) -> float:
    """From the stall's end in the ledger to the time of the manifest, for the checkpoints that are still there, but for
    those that a rank saved which was left: they belong to no stall."""
    ends = [event["time"] for event in events if event.get("category") == CHECKPOINT]
    delays = []
    for step in visible_steps(run / "checkpoints"):
        path = step_folder(run / "checkpoints", step)
        try:
            manifest, written = read_manifest(path), (path / MANIFEST).stat().st_mtime
        except (ValueError, OSError):  # damaged, or removed by a run under way
            continue
        writers = sum(name.endswith(".safetensors") for name in manifest["files"])
        if writers == manifest["world_size"]:
            delays.append(written - max((end for end in ends if end <= written), default=written))
    return mean(delays) if delays else 0.0


def poisson(rate: float, draw: random.Random) -> Iterator[float]:
    """Fault times in seconds from the first step, `rate` a second on average."""
    return itertools.accumulate(draw.expovariate(rate) for _ in itertools.count())


def once_a_period(period: float, draw: random.Random) -> Iterator[float]:
    """Fault times as `--chaos kill:60s` has them: one in each period, at a uniformly random moment of it."""
    return ((number + draw.random()) * period for number in itertools.count())


def simulate(costs: Costs, every: int, faults: Iterator[float], steps: float) -> float:
    """The report's goodput of a run of `steps` steps that saves after each `every`, struck by `faults`."""
    cycle = every * costs.cadence + costs.stall
    done, now, fault = 0.0, 0.0, next(faults)
    rescues = 0.5  # dealt evenly: a rescue each time that their expected number grows past a whole one
    while True:
        left = steps - done
        finish = now + left * costs.cadence + math.ceil(left / every) * costs.stall
        if finish <= fault:
            wall = costs.start_up + finish
            return steps * (costs.ideal_step + costs.evaluation) / wall
        cycles, into = divmod(fault - now, cycle)
        # The last save may not be committed yet; then the one before it counts.
        committed = cycles if into >= costs.commit - 1e-9 or not cycles else cycles - 1
        rescues += costs.rescued
        if rescues >= 1:
            rescues -= 1
            done += cycles * every + min(every, into // costs.cadence)
        else:
            done += committed * every
        now = fault
        while fault <= now:  # also struck again while restarting
            now, fault = fault + costs.restart, next(faults)


def young_interval(costs: Costs, rate: float) -> float:
    """Seconds of work between saves that waste least, to first order: √(2 · stall / rate)."""
    return math.sqrt(2 * costs.stall / rate)


def expected(costs: Costs, every: int, rate: float) -> float:
    """Goodput of a run that is long enough for some 4,000 faults at `rate` a second, the same for all `every`."""
    steps = 2000 / rate / costs.cadence
    return simulate(costs, every, poisson(rate, random.Random(0)), steps)


def projection(costs: Costs, every: int, rate_per_gpu_hour: float) -> list[tuple[int, float, float, float, float]]:
    """Rows for 8 … 8,192 GPUs: GPUs, hours between faults, goodput in percent at `every`, Young's interval in seconds,
    but no shorter than a commit takes, and goodput there. The costs are taken to stay what they are on the measured
    machine."""
    rows = []
    for gpus in (2**power for power in range(3, 14)):
        rate = gpus * rate_per_gpu_hour / 3600
        interval = max(young_interval(costs, rate), costs.commit)
        steps = max(1, round(interval / costs.cadence))
        at_every, at_interval = (100 * expected(costs, count, rate) for count in (every, steps))
        rows.append((gpus, 1 / rate / 3600, at_every, steps * costs.cadence, at_interval))
    return rows
