"""A ladder's runs: claimed one by one by whoever works in its folder, resumed, read off as points.

The folder holds `runs/NAME/` (each a pre-training run), `claims/` (a lock for each run, which the system takes back
from a process that dies), `logs/NAME.txt`, `tokenizer/`, `points.json` and `report/`. Workers on other machines need
nothing but the same folder.
"""

import json
import os
import shutil
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
from mai_thinking.experiments.ladder_plan import PlannedRun, plan_runs, plan_table
from mai_thinking.experiments.queue import WorkQueue
from mai_thinking.experiments.scaling.points import Point, PointSet
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model_config
from mai_thinking.training.stop import StopRequest

BITS = "bits_per_byte/"


def run_ladder(
    ladder: LadderConfig, *, dry_run: bool = False, report: Callable[[PointSet, Path, str], str] | None = None
) -> int:
    """Work on `ladder` until nothing is left to take; returns the exit code. `report` concludes from the points, writes
    its page into a folder and returns it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a ladder's workers are single processes: start scripts/ladder.py several times, without a launcher"
        )
    runs = plan_runs(ladder)
    if dry_run:
        print(plan_table(runs))
        return 0
    ladder.folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(ladder.folder / "ladder.yaml") as path:
        save_config(ladder, path)
    code = work(ladder, with_one_yardstick(ladder, runs))
    points = collect(ladder, runs)
    if points is None:
        print("no run of the baseline is finished: nothing to conclude yet")
    elif report is not None:
        print(report(points, ladder.folder / "report", ladder.name))
    return code


def work(ladder: LadderConfig, runs: Sequence[PlannedRun]) -> int:
    """Train, the cheapest first, what nobody has trained or is training; returns the exit code. A run that fails is
    told, and the others go on."""
    failed: set[str] = set()
    with WorkQueue(ladder.folder) as queue, closing(StopRequest()) as stop:
        while not stop.requested:
            with queue.planning():
                left = {run.name: run for run in runs if not run.folder.finished and run.name not in failed}
                name = queue.take(left)
            if name is None:
                return EXIT_FAILED if failed else 0
            try:
                if train(ladder, left[name]) == EXIT_INTERRUPTED:
                    break
            except RunError as error:
                print(f"{name} failed: {error}")
                failed.add(name)
            else:
                collect(ladder, runs)
    return EXIT_INTERRUPTED


def train(ladder: LadderConfig, run: PlannedRun) -> int:
    """Train one run, or go on with it; returns the exit code. What it says goes to `logs/NAME.txt`."""
    log = ladder.folder / "logs" / f"{run.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file):
        code = pretrain(run.config)
    if code == 0:
        shutil.rmtree(run.folder.checkpoints, ignore_errors=True)  # many runs; nobody goes on with a finished one
        point = read_point(run)
        losses = ", ".join(f"{category} {value:.4f}" for category, value in point.loss.items())
        print(f"{run.name}: {losses} bits per byte; {point.flops:.3g} FLOPs, {point.seconds or 0:.1f} s", flush=True)
    return code


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
