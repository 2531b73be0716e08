"""A ladder: every variant at every depth and seed (`experiments.runs`), read off as points.

Beside its runs the folder holds `points.json`, `plan.json` and `report/`.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from mai_thinking.config.ladder import LadderConfig
from mai_thinking.config.loading import save_config
from mai_thinking.config.storage import atomic_file
from mai_thinking.data import PreparedData, prepare
from mai_thinking.errors import UsageError
from mai_thinking.experiments.runs import PlannedRun, plan_table, share_tokenizer, work
from mai_thinking.experiments.scaling.analysis import analyse
from mai_thinking.experiments.scaling.points import Point, PointSet
from mai_thinking.experiments.scaling.power import Plan, pilots, propose
from mai_thinking.training.metrics import read_metrics
from mai_thinking.training.model_files import load_model_config, model_config

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
    code = work_on(ladder, with_one_yardstick(ladder, runs))
    points = collect(ladder, runs)
    if points is None:
        print("no run of the baseline is finished: nothing to conclude yet")
    elif report is not None:
        print(report(points, ladder.folder / "report", ladder.name))
    return code


def plan_runs(ladder: LadderConfig) -> list[PlannedRun]:
    """All runs, rung by rung and seed by seed, so that whatever is done when a ladder stops can be compared."""
    runs = []
    for rung in sorted(ladder.rungs):
        for seed in ladder.seeds_of(rung):
            for variant in ladder.variants:
                config = ladder.run_config(variant, rung, seed, steps=1)
                tokens = ladder.tokens_per_active_parameter * model_config(config).parameter_counts()[1]
                steps = max(1, round(tokens / config.batch.tokens_per_step))
                runs.append(PlannedRun(variant.name, ladder.run_config(variant, rung, seed, steps), variant.probe))
    return runs


def work_on(ladder: LadderConfig, runs: Sequence[PlannedRun]) -> int:
    """Train, the cheapest first, what is missing; returns the exit code."""

    def told(run: PlannedRun) -> str:
        collect(ladder, runs)
        point = read_point(run)
        losses = ", ".join(f"{category} {value:.4f}" for category, value in point.loss.items())
        return f"{run.name}: {losses} bits per byte; {point.flops:.3g} FLOPs, {point.seconds or 0:.1f} s"

    return work(ladder.folder, runs, told=told)


def plan_ladder(ladder: LadderConfig, minutes: float) -> str:
    """What to spend `minutes` of one worker on, from the runs that are there; also written to `plan.json`. UsageError
    where they say too little."""
    points = collect(ladder, plan_runs(ladder))
    few = "a plan needs two seeds of three rungs at least; run this ladder with 'seeds=[0, 1, 2]' first"
    if points is None:
        raise UsageError(f"{ladder.name}: no run of the baseline is finished: {few}")
    known = pilots(points, analyse(points))
    if len(known) < 3:
        raise UsageError(f"{ladder.name}: pairs on {len(known)} rungs: {few}")
    deciding, best = propose(known, 60 * minutes, ladder.difference)
    lines = [
        f"L{p.rung}: a pair's log gain scatters by {p.spread:.3f} ({p.freedom} degrees of freedom); one seed of all "
        f"configs takes {p.seconds:.0f} s"
        for p in known
    ]
    if deciding is not None:
        lines.append(f"a gain of {ladder.difference:.0%} is decided with a power of 90 % by {_spell_plan(deciding)}")
    else:
        lines.append(f"a gain of {ladder.difference:.0%} cannot be decided in {minutes:g} minutes with 90 % power")
        lines.append(
            f"the least that can: {best.least:.1%}, by {_spell_plan(best)}"
            if best is not None
            else "nor can any other: three pairs on each of three rungs take longer; make the rungs cheaper"
        )
    tree = {"minutes": minutes, "difference": ladder.difference, "pilots": [asdict(pilot) for pilot in known]}
    tree |= {name: plan and asdict(plan) for name, plan in (("deciding", deciding), ("best", best))}
    with atomic_file(ladder.folder / "plan.json") as path:
        path.write_text(json.dumps(tree, indent=1) + "\n")
    return "\n".join(lines)


def _spell_plan(plan: Plan) -> str:
    rungs = ", ".join(map(str, plan.seeds))
    seeds = ", ".join(f"{rung}: {pairs}" for rung, pairs in plan.seeds.items())
    return f"'rungs=[{rungs}]' 'seeds={{{seeds}}}' in {plan.seconds / 60:.1f} minutes, what is done included"


def collect(ladder: LadderConfig, runs: Sequence[PlannedRun]) -> PointSet | None:
    """Points of all finished runs, also written to `points.json`; None before the baseline has one."""
    points = [read_point(run) for run in runs if run.folder.finished]
    if all(point.config != ladder.baseline.name for point in points):
        return None
    point_set = PointSet(baseline=ladder.baseline.name, points=tuple(points), difference=ladder.difference)
    with atomic_file(ladder.folder / "points.json") as path:
        path.write_text(json.dumps(point_set.model_dump(), indent=1) + "\n")
    return point_set


def read_point(run: PlannedRun) -> Point:
    """What a finished run cost and came to: held-out bits per byte by category.

    Seconds are the median step's times the steps, so that a neighbour's noise or an interruption does not count.
    """
    steps, evaluations = read_metrics(run.folder.path)
    architecture = load_model_config(run.folder.architecture)
    return Point(
        config=run.variant,
        seed=run.config.seed,
        rung=run.rung,
        flops=architecture.flops_per_token(run.config.batch.context_length) * run.tokens,
        seconds=median(record["seconds"] for record in steps) * run.config.steps,
        wall=json.loads(run.folder.notes.read_bytes()).get("wall"),
        loss={name.removeprefix(BITS): value for name, value in evaluations[-1].items() if name.startswith(BITS)},
    )


def with_one_yardstick(ladder: LadderConfig, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs, with the baseline's tokenizer for those that differ in their data, once it is known that all are
    evaluated on the same text; `UsageError` if they are not."""
    # How much of its sources a run reads says nothing about its held-out text.
    datas = {run.variant: run.config.data.model_copy(update={"down_sample": 1.0}) for run in runs}
    base = datas[ladder.baseline.name]
    prepared = prepare(base, log=print)
    shared = base.tokenizer.model_copy(update={"path": str(share_tokenizer(ladder.folder, prepared))})
    tokenizers = {name: data.tokenizer for name, data in datas.items()}
    for name, data in datas.items():
        if data == base:
            continue
        if data.tokenizer == base.tokenizer and base.tokenizer.path is None:
            tokenizers[name] = shared
        other = data.model_copy(update={"tokenizer": tokenizers[name]})
        _check_held_out(name, prepared, prepare(other, log=print))
    made = []
    for run in runs:
        data = run.config.data.model_copy(update={"tokenizer": tokenizers[run.variant]})
        made.append(replace(run, config=run.config.model_copy(update={"data": data})))
    return made


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
