"""A card's first minutes: what is worth knowing most comes first, and is on the disk before the next part begins.

Each part is a process of its own, so that one which fails, hangs or runs out of memory costs its own figures only. A
part that the time left is too short for is left out, and said so.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mai_thinking.config.storage import atomic_file
from mai_thinking.training.checkpoint_storage import step_folder, visible_steps
from mai_thinking.training.metrics import read_records

Figures = dict[str, Any]
GRACE = 20.0
"""Seconds that a part has to save after its time is up."""


@dataclass(frozen=True)
class Part:
    """One thing to know."""

    name: str
    what: str
    commands: Sequence[Sequence[str]]
    """Arguments of this Python, one after the other."""
    least: float = 0.0
    """Seconds without which it is not begun."""
    most: float = 3600.0
    """Seconds after which it is ended."""
    between: Callable[[], None] = lambda: None
    """Called before each command but the first."""
    figures: Callable[[str], Figures] = lambda text: {}
    """From what the commands printed and left."""


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    what: str
    commands: list[str]
    state: str
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)


def parts_of(work: Path, *, tiny: bool) -> list[Part]:
    """In order of worth. `tiny`: the same on a CPU, with models that take no time."""
    base, climb, twice = work / "base", work / "climb", work / "twice"
    size, rl = ("tiny", "tiny-grpo") if tiny else ("L6-think", "L6-think-grpo")
    pretrain = ["scripts/pretrain.py", f"configs/{size}.yaml"]
    again = [*pretrain, f"output_dir={twice}", "name=twice", "steps=8", "checkpoint.every=4", "schedule.warmup_steps=2"]
    model = str(base / "final") if tiny else "none"
    rollout = ["scripts/bench.py", "rollout", model, "--rounds", "2", "--json"]
    plan = ["scripts/pretrain.py", "configs/L12.yaml", "--dry-run"]  # to compare with
    step = [["scripts/bench.py", "card", "--rounds", "4", "--json"], plan]
    rise = ["scripts/grpo.py", f"configs/{rl}.yaml", f"output_dir={climb}", f"init_from={base / 'final'}"]
    return [
        Part("tests", "the tests that need a GPU", [["-m", "pytest", "-q", "-m", "gpu", "tests"]], most=150),
        Part("step", "L12: tokens/s, MFU, memory; each switch off once", step, least=60, most=240, figures=_bench),
        Part("base", "a base of L6", [[*pretrain, f"output_dir={base}"]], most=240, figures=lambda _: _run(base)),
        Part("climb", "GRPO of it: its curve, learner against engine", [rise], 45, 240, figures=lambda _: _run(climb)),
        Part(
            "resume", "the same bits from a checkpoint", [again, again],
            most=90, between=lambda: _take_back(twice), figures=lambda _: _same(twice),
        ),
        Part("rollouts", "the engine against `generate`", [rollout], least=20, most=150, figures=_bench),
    ]  # fmt: skip


def run_parts(parts: Sequence[Part], minutes: float, out: Path) -> list[Outcome]:
    """Run what there is time for; the outcomes are in `out` after each part, with everything that was printed."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    for part in parts:
        outcome = Outcome(part.name, part.what, [" ".join(("python", *c)) for c in part.commands], "left out: no time")
        left = end - time.monotonic()
        if left > max(part.least, GRACE):
            _run_part(part, outcome, min(part.most, left - GRACE), out / f"{part.name}.txt")
        outcomes.append(outcome)
        _write(outcomes, out)
        print(f"{part.name}: {outcome.state}, {outcome.seconds:.0f} s", flush=True)
    return outcomes


def _run_part(part: Part, outcome: Outcome, seconds: float, log: Path) -> None:
    begin = time.monotonic()
    outcome.state = "done"
    with log.open("w") as output:
        try:
            for number, command in enumerate(part.commands):
                if number:
                    part.between()
                left = begin + seconds - time.monotonic()
                if (code := _run_command(command, left, output)) != 0:
                    outcome.state = "ended: its time was up" if code is None else f"failed: exit code {code}"
                    break
        except Exception as error:
            outcome.state = f"failed: {type(error).__name__}: {error}"
    outcome.seconds = time.monotonic() - begin
    try:  # of what was cut short too
        outcome.figures = part.figures(log.read_text())
    except Exception as error:
        outcome.figures = {"none": f"{type(error).__name__}: {error}"}


def _run_command(command: Sequence[str], seconds: float, output: Any) -> int | None:
    """Its exit code, or None if it had to be ended: first asked to, so that it saves."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            try:
                process.wait(GRACE / 2)
                break
            except subprocess.TimeoutExpired:
                continue
        return None


def _bench(text: str) -> Figures:
    """The JSON object in one of the lines."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {}


def _run(folder: Path) -> Figures:
    """A run's curves."""
    records = read_records(folder / "metrics.jsonl")
    steps = [record for record in records if "kind" not in record]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    figures: Figures = {"steps": len(steps)}
    for name in ("pass@1", "bits_per_byte"):
        if values := [(r["step"], round(r[name], 4)) for r in evaluations if name in r]:
            figures[name] = values
    if speeds := sorted(record["tokens_per_second"] for record in steps):
        figures["tokens_per_second"] = round(speeds[len(speeds) // 2])
    if mismatches := [record["mismatch"] for record in steps if "mismatch" in record]:
        figures["mismatch"] = max(mismatches)
    return figures


def _take_back(run: Path) -> None:
    """Keep the finished run's weights, and leave its folder as a kill after the last but one checkpoint would have."""
    shutil.copytree(run / "final", run.with_name("first"))
    shutil.rmtree(run / "final")
    shutil.rmtree(step_folder(run / "checkpoints", visible_steps(run / "checkpoints")[-1]))
    (run / "evaluations.jsonl").unlink(missing_ok=True)


def _same(run: Path) -> Figures:
    """Whether both attempts left the same weights; the steps' losses are compared when they are computed again."""
    hashes = [_sha256(folder / "model.safetensors") for folder in (run.with_name("first"), run / "final")]
    return {"same bits": hashes[0] == hashes[1], "sha256": hashes[0]}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write(outcomes: Sequence[Outcome], out: Path) -> None:
    from mai_thinking.bench.machine import describe

    machine = describe()
    with atomic_file(out / "summary.json") as path:
        path.write_text(json.dumps({"machine": machine, "parts": [asdict(o) for o in outcomes]}, indent=1) + "\n")
    lines = ["# A card's minutes", "", ", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["| part | | state | seconds |", "|---|---|---|---:|"]
    lines += [f"| [{o.name}]({o.name}.txt) | {o.what} | {o.state} | {o.seconds:.0f} |" for o in outcomes]
    for outcome in outcomes:
        lines += ["", f"## {outcome.name}", "", *(f"    {command}" for command in outcome.commands)]
        lines += ["", "```json", json.dumps(outcome.figures, indent=1), "```"] if outcome.figures else []
    with atomic_file(out / "summary.md") as path:
        path.write_text("\n".join(lines) + "\n")
