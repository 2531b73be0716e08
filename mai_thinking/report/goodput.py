"""What `scripts/goodput.py RUN` shows of a run's ledger, which stands on its page too: a table, and the timeline."""

import random
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.markdown import Markdown

from mai_thinking.config.table import Cell, Table
from mai_thinking.errors import UsageError
from mai_thinking.launch.goodput import Account, account_of
from mai_thinking.report.figures import Figure, Panel, Timeline, condensed, save
from mai_thinking.report.projection import Costs, measure, once_a_period, projection, simulate
from mai_thinking.report.reading import read_config
from mai_thinking.training.ledger import CATEGORIES, EVALUATION, PRODUCTIVE, SLOW

_COLOURS = ("#2a9d5c", "#a9cf8d", "#3a7ebf", "#e0b548", "#c93f50", "#ec7c4c", "#8560bb", "#56626c", "#b8b9c6")
_COUNTS_IN = {PRODUCTIVE: ("✓", "✓"), SLOW: ("", "✓"), EVALUATION: ("✓", "")}
"""The report's goodput, and the common one."""


def report(run: Path, console: Console) -> None:
    """Print the table of the run in folder `run` and draw `report/goodput.png` there."""
    if not (run / "events.jsonl").is_file():
        raise UsageError(f"{run}: no events.jsonl; name the output_dir of a run, such as runs/nano")
    result, file = account_of(run), run / "report" / "goodput.png"
    console.print(f"goodput of {run}", Markdown(table_of(result).markdown()), summary(result), sep="\n")
    try:
        if result.segments and save(figure(result), file):
            console.print(f"timeline: {file}")
    except OSError as error:  # somebody else's run, say: the table is told
        console.print(f"no timeline: {file} cannot be written ({error.strerror})")


def report_projection(run: Path, failures_per_gpu_hour: float, console: Console) -> None:
    """Print what the costs of the run in folder `run` would come to on 8 … 8,192 GPUs."""
    costs, every = measure(run), _saves_every(run)
    names = ("GPUs", "hours between faults", f"saving every {every} steps, %", "Young's interval, s", "goodput, %")
    table = Table(names, projection(costs, every, failures_per_gpu_hour), digits=2)
    told = f"one failure in {1 / failures_per_gpu_hour:,.0f} GPU-hours; the costs are taken to stay the same"
    title = f"expected goodput, from the costs of {run}"
    console.print(_spell_costs(costs), told, title, Markdown(table.markdown()), sep="\n")


def report_prediction(run: Path, period: float, steps: int, console: Console) -> None:
    """Print the goodput that a run like the one in folder `run` should have with one kill in every `period` seconds."""
    costs, every = measure(run), _saves_every(run)
    outcomes = [simulate(costs, every, once_a_period(period, random.Random(seed)), steps) for seed in range(200)]
    console.print(_spell_costs(costs))
    console.print(
        f"{steps:,} steps, one kill in every {period:g} s: goodput {mean(outcomes):.2%} "
        f"(200 simulated runs from {min(outcomes):.2%} to {max(outcomes):.2%})"
    )


def table_of(result: Account) -> Table:
    """Seconds and share of the wall-clock per category, and what each definition makes of it."""
    rows: list[list[Cell]] = [
        [name, result.seconds[name], 100 * result.share(name), *_COUNTS_IN.get(name, ("", ""))] for name in CATEGORIES
    ]
    rows.append(["wall-clock", result.wall_clock, 100.0, 100 * result.report_goodput, 100 * result.common_goodput])
    return Table(["category", "seconds", "share, %", "the report's goodput, %", "the common, %"], rows, digits=2)


def summary(result: Account) -> str:
    """The counts and mean costs behind the table, a line each."""
    lines = [
        f"{result.steps:,} steps kept, {result.recomputed_steps:,} computed again, {result.attempts} attempts; "
        f"best step {result.best_step_seconds:.4f} s",
    ]
    if result.recoveries:
        lines.append(
            f"{len(result.recoveries)} restarts, {result.rescued} of them from a just-in-time checkpoint, "
            f"{mean(result.recoveries):.2f} s each to the next whole step"
        )
    if result.saves:
        lines.append(f"{len(result.saves)} checkpoints, {mean(result.saves):.3f} s of the loop each")
    if result.stopped:
        lines.append(f"stopped on request for {result.stopped:,.0f} s, which is not counted")
    return "\n".join(lines)


def figure(result: Account) -> Figure:
    """The timeline, and below it every kept step's seconds."""
    ends = [end - result.begin for end, _ in result.step_seconds]
    steps = condensed("seconds", ends, [taken for _, taken in result.step_seconds], style="dots")
    best = [(result.best_step_seconds, "grey")] if result.step_seconds else []
    panel = Panel("seconds a step (dashed: the best)", [steps], x_name="seconds since the start", guides=best)
    return Figure("goodput", [timeline(result), panel], columns=1, size=(11, 2.6), heights=(1, 3))


def timeline(result: Account) -> Timeline:
    """What filled the run when, without the time in which it was stopped on request."""
    stretches: dict[str, list[tuple[float, float]]] = {category: [] for category in CATEGORIES}
    now = 0.0
    for category, begin, end in result.segments:
        stretches[category].append((now, end - begin))
        now += end - begin
    names = {name: f"{name} {result.share(name):.1%}" for name in CATEGORIES if result.seconds[name] > 0}
    return Timeline(
        f"goodput {result.report_goodput:.1%} (the report's), {result.common_goodput:.1%} (common)",
        {"": {shown: stretches[name] for name, shown in names.items()}},
        {names[name]: colour for name, colour in zip(CATEGORIES, _COLOURS, strict=True) if name in names},
    )


def _saves_every(run: Path) -> int:
    return int(read_config(run)["checkpoint"]["every"])


def _spell_costs(costs: Costs) -> str:
    return (
        f"step {costs.step:.4f} s (best {costs.ideal_step:.4f}), evaluation {costs.evaluation:.4f} s a step, "
        f"save {costs.stall:.3f} s + {costs.commit:.2f} s in the background, restart {costs.restart:.2f} s "
        f"({costs.rescued:.0%} of them without a lost step), start-up {costs.start_up:.1f} s"
    )
