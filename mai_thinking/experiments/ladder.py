"""A ladder's runs: claimed one by one by whoever works in its folder, resumed, kept to a budget, read off as points.

The folder holds `runs/NAME/` (each a pre-training run), `claims/` (a lock for each run, which the system takes back
from a process that dies), `logs/NAME.txt`, `tokenizer/`, `points.json` and `report/`. Workers on other machines need
nothing but the same folder.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median

from mai_thinking.config.command import EXIT_FAILED, EXIT_INTERRUPTED
from mai_thinking.config.data import DataSection
from mai_thinking.config.ladder import LadderConfig
from mai_thinking.config.loading import save_config
from mai_thinking.config.storage import atomic_file, atomic_folder
from mai_thinking.data import PreparedData, prepare
from mai_thinking.errors import RunError, UsageError
from mai_thinking.experiments.ladder_plan import PlannedRun, StepTime, StepTimer, plan_runs, plan_table
from mai_thinking.experiments.queue import WorkQueue
from mai_thinking.experiments.scaling.points import Point, PointSet
from mai_thinking.launch.goodput import account_of
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model_config
from mai_thinking.training.stop import StopRequest

BITS = "bits_per_byte/"
Timer = Callable[[PlannedRun], StepTime]


def run_ladder(
    ladder: LadderConfig, *, dry_run: bool = False, report: Callable[[PointSet, Path, str], str] | None = None
) -> int:
    """Work on `ladder` until nothing is left to take or the budget is spent; returns the exit code. `report` concludes
    from the points, writes its page into a folder and returns it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a ladder's workers are single processes: start scripts/ladder.py several times, without a launcher"
        )
    runs = plan_runs(ladder)
    timer = StepTimer()
    if dry_run:
        print(plan_table(runs, {run.name: timer(run) for run in runs}))
        return 0
    worker = Worker(ladder, runs, timer)
    with atomic_file(ladder.folder / "ladder.yaml") as path:
        save_config(ladder, path)
    worker.runs = with_one_yardstick(ladder, runs)
    code = worker.work()
    points = collect(ladder, runs)
    if points is None:
        print("no run of the baseline is finished: nothing to conclude yet")
    elif report is not None:
        print(report(points, ladder.folder / "report", ladder.name))
    return code


class Worker:
    """One process that takes runs from a ladder, the cheapest first."""

    def __init__(self, ladder: LadderConfig, runs: Sequence[PlannedRun], timer: Timer) -> None:
        self.ladder, self.runs, self.timer = ladder, runs, timer
        self.queue = WorkQueue(ladder.folder)
        for name in ("logs", "runs"):
            (ladder.folder / name).mkdir(exist_ok=True)
        self.failed: set[str] = set()
        self._spent: dict[str, tuple[float, float]] = {}

    def work(self) -> int:
        """Train what nobody has trained or is training; returns the exit code."""
        stop = StopRequest()
        with self.queue, closing(stop):
            while not stop.requested:
                run = self._take()
                if run is None:
                    return EXIT_FAILED if self.failed else 0
                if not self._affordable(run):
                    print(f"the budget does not reach for {run.name}; stopping with what there is")
                    return 0
                if self._train(run) == EXIT_INTERRUPTED:
                    break
        # What stopped it is the budget's alarm, or somebody outside.
        return EXIT_INTERRUPTED if self._in_budget() else 0

    def _take(self) -> PlannedRun | None:
        """The first run that is neither finished nor somebody else's; None if all are."""
        with self.queue.planning():
            left = {run.name: run for run in self.runs if not run.folder.finished and run.name not in self.failed}
            name = self.queue.take(left)
        return None if name is None else left[name]

    def _train(self, run: PlannedRun) -> int:
        log = self.ladder.folder / "logs" / f"{run.name}.txt"
        seconds_left = self._left()[0]
        alarm = threading.Timer(min(seconds_left, threading.TIMEOUT_MAX), os.kill, (os.getpid(), signal.SIGTERM))
        alarm.daemon = True
        alarm.start()
        try:
            with log.open("a", encoding="utf-8") as file, redirect_stdout(file):
                code = pretrain(run.config)
        except RunError as error:
            print(f"{run.name} failed: {error}")
            self.failed.add(run.name)
            return EXIT_FAILED
        finally:
            alarm.cancel()
        if code == 0:
            shutil.rmtree(run.folder.checkpoints, ignore_errors=True)  # many runs; nobody goes on with a finished one
            point = read_point(run)
            print(f"{run.name}: {_spell(point)}", flush=True)
            collect(self.ladder, self.runs)
        return code

    # ------------------------------------------------------------------------------------------------- the budget

    def _left(self) -> tuple[float, float]:
        """(seconds, FLOPs) that nobody has spent yet; inf where there is no limit."""
        seconds = flops = 0.0
        for run in self.runs:
            spent = self._spent.get(run.name) or spent_on(run)
            if run.folder.finished:
                self._spent[run.name] = spent
            seconds, flops = seconds + spent[0], flops + spent[1]
        budget = self.ladder.budget
        return (budget.seconds or float("inf")) - seconds, (budget.flops or float("inf")) - flops

    def _in_budget(self) -> bool:
        return min(self._left()) > 0

    def _affordable(self, run: PlannedRun) -> bool:
        """Whether the rest of `run` fits into what is left, by the time of a step measured here."""
        seconds, flops = self._left()
        if seconds == flops == float("inf"):
            return True
        rest = max(0.0, 1 - spent_on(run)[1] / run.flops)
        by_time = seconds == float("inf") or rest * run.config.steps * self.timer(run).seconds <= seconds
        return by_time and rest * run.flops <= flops


def spent_on(run: PlannedRun) -> tuple[float, float]:
    """(seconds of wall-clock, FLOPs) that went into a run so far, over all its attempts."""
    if not run.folder.events.exists():
        return 0.0, 0.0
    account = account_of(run.folder.path)
    return account.wall_clock, run.flops * (account.steps + account.recomputed_steps) / run.config.steps


# ----------------------------------------------------------------------------------------------------------- points


def collect(ladder: LadderConfig, runs: Sequence[PlannedRun]) -> PointSet | None:
    """Points of all finished runs, also written to `points.json`; None before the baseline has one."""
    points = [read_point(run) for run in runs if run.folder.finished]
    if all(point.config != ladder.baseline.name for point in points):
        return None
    point_set = PointSet(baseline=ladder.baseline.name, points=tuple(points))
    with atomic_file(ladder.folder / "points.json") as path:
        path.write_text(json.dumps(point_set.model_dump(), indent=1) + "\n")
    return point_set


def read_point(run: PlannedRun) -> Point:
    """What a finished run cost and came to: held-out bits per byte by category.

    Seconds are the median step's times the steps, so that a neighbour's noise or an interruption does not count.
    """
    records = read_records(run.folder.metrics)
    steps = [record for record in records if "kind" not in record]
    last = [record for record in records if record.get("kind") == "evaluation"][-1]
    architecture = load_model_config(run.folder.architecture)
    return Point(
        config=run.variant,
        seed=run.seed,
        rung=run.rung,
        flops=architecture.flops_per_token(run.config.batch.context_length) * run.tokens,
        seconds=median(record["seconds"] for record in steps) * run.config.steps,
        loss={name.removeprefix(BITS): value for name, value in last.items() if name.startswith(BITS)},
    )


def _spell(point: Point) -> str:
    losses = ", ".join(f"{category} {value:.4f}" for category, value in point.loss.items())
    return f"{losses} bits per byte; {point.flops:.3g} FLOPs, {point.seconds or 0:.1f} s"


# ------------------------------------------------------------------------------------------------------ comparability


def with_one_yardstick(ladder: LadderConfig, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs, with the baseline's tokenizer for those that differ in their data, once it is known that all are
    evaluated on the same text; `UsageError` if they are not."""
    by_variant = {run.variant: run.config for run in runs}
    base = by_variant[ladder.baseline.name].data
    prepared = prepare(base, log=print)
    shared = ladder.folder / "tokenizer"
    with WorkQueue(ladder.folder).planning():
        if not shared.exists():
            with atomic_folder(shared) as path:
                prepared.tokenizer.save_pretrained(path)
    datas: dict[str, DataSection] = {}
    for name, config in by_variant.items():
        data = config.data
        if data != base and data.tokenizer == base.tokenizer and base.tokenizer.path is None:
            data = data.model_copy(update={"tokenizer": data.tokenizer.model_copy(update={"path": str(shared)})})
        if data != base:
            _check_held_out(name, prepared, prepare(data, log=print))
        datas[name] = data
    return [replace(run, config=run.config.model_copy(update={"data": datas[run.variant]})) for run in runs]


def _check_held_out(name: str, baseline: PreparedData, other: PreparedData) -> None:
    ours, theirs = (
        {category: sorted(document.text for document in found) for category, found in data.held_out.items() if found}
        for data in (baseline, other)
    )
    different = sorted(category for category in ours | theirs if ours.get(category) != theirs.get(category))
    if different:
        raise UsageError(
            f"candidate {name!r} is evaluated on other text than the baseline ({', '.join(different)}): hold out the "
            "same sources in both, unchanged, and set `held_out: false` for the others"
        )
