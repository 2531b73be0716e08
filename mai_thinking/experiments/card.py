"""A card's first minutes: what is worth knowing most comes first, and is on the disk before the next part begins.

Each part is a process of its own, so that one which fails, hangs or runs out of memory costs its own figures only. A
part that the time left is too short for is left out, and said so.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mai_thinking.bench.machine import describe
from mai_thinking.config.storage import atomic_file, checksum
from mai_thinking.training.checkpoint_storage import step_folder, visible_steps
from mai_thinking.training.metrics import read_metrics

Figures = dict[str, Any]
GRACE = 60.0
"""Seconds kept for a part to save when its time is up; half of them are its own."""


class Part(NamedTuple):
    """One thing to know."""

    name: str
    what: str
    commands: Sequence[Sequence[str]]
    """Arguments of this Python, one after the other."""
    least: float = 0.0
    """Seconds without which it is not begun."""
    most: float = 3600.0
    """Seconds after which it is ended."""
    figures: Callable[[str], Figures] = lambda text: {}
    """From what the commands printed and left."""
    between: Callable[[], None] = lambda: None
    """Called before each command but the first."""


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
            most=90, figures=lambda _: _same(twice), between=lambda: _take_back(twice),
        ),
        Part("rollouts", "the engine against `generate`", [rollout], least=20, most=150, figures=_bench),
    ]  # fmt: skip


def run_parts(parts: Sequence[Part], minutes: float, out: Path) -> list[dict[str, Any]]:
    """Run what there is time for; what became of each part is in `out` when the next begins, with all that it
    printed. Other parts that were run before stay there."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    before = json.loads((out / "summary.json").read_text())["parts"] if (out / "summary.json").exists() else []
    outcomes: list[dict[str, Any]] = [one for one in before if one["name"] not in {part.name for part in parts}]
    for part in parts:
        commands = [" ".join(("python", *command)) for command in part.commands]
        outcome: dict[str, Any] = {"name": part.name, "what": part.what, "commands": commands}
        outcome |= {"state": "left out: no time", "seconds": 0.0, "figures": {}}
        left = end - time.monotonic()
        if left > max(part.least, GRACE):
            begin = time.monotonic()
            outcome["state"], outcome["figures"] = _run_part(part, min(part.most, left - GRACE), out)
            outcome["seconds"] = time.monotonic() - begin
        outcomes.append(outcome)
        _write(outcomes, out)
        print(f"{part.name}: {outcome['state']}, {outcome['seconds']:.0f} s", flush=True)
    return outcomes


def _run_part(part: Part, seconds: float, out: Path) -> tuple[str, Figures]:
    """(its state, its figures)"""
    begin, log, state = time.monotonic(), out / f"{part.name}.txt", "done"
    with log.open("w") as output:
        try:
            for number, command in enumerate(part.commands):
                if number:
                    part.between()
                left = max(1.0, begin + seconds - time.monotonic())
                # First asked to end, so that it saves.
                limited = ["timeout", f"--kill-after={GRACE / 2}", str(left), sys.executable, *command]
                if (code := subprocess.run(limited, stdout=output, stderr=subprocess.STDOUT).returncode) != 0:
                    # `timeout` ends itself by the signal that it sent.
                    state = "ended: its time was up" if code in (124, 137, -9) else f"failed: exit code {code}"
                    break
        except Exception as error:
            state = f"failed: {type(error).__name__}: {error}"
    try:  # of what was cut short too
        return state, part.figures(log.read_text())
    except Exception as error:
        return state, {"none": f"{type(error).__name__}: {error}"}


def _bench(text: str) -> Figures:
    """The JSON object in one of the lines."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return dict(json.loads(lines[-1])) if lines else {}


def _run(folder: Path) -> Figures:
    """A run's curves."""
    steps, evaluations = read_metrics(folder)
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
    hashes = [checksum(folder / "model.safetensors", "sha256") for folder in (run.with_name("first"), run / "final")]
    return {"same bits": hashes[0] == hashes[1], "sha256": hashes[0]}


def _write(outcomes: Sequence[dict[str, Any]], out: Path) -> None:
    machine = describe()
    with atomic_file(out / "summary.json") as path:
        path.write_text(json.dumps({"machine": machine, "parts": outcomes}, indent=1) + "\n")
    lines = ["# A card's minutes", "", ", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["| part | | state | seconds |", "|---|---|---|---:|"]
    lines += ["| [{name}]({name}.txt) | {what} | {state} | {seconds:.0f} |".format(**outcome) for outcome in outcomes]
    for outcome in outcomes:
        lines += ["", f"## {outcome['name']}", "", *(f"    {command}" for command in outcome["commands"])]
        lines += ["", "```json", json.dumps(outcome["figures"], indent=1), "```"] if outcome["figures"] else []
    with atomic_file(out / "summary.md") as path:
        path.write_text("\n".join(lines) + "\n")
