"""The proof of asynchronous RL (MAI-Thinking-1 report §3.6): exact where nothing is stale, the same again by its
schedule where something is, nothing lost when processes die, and the time that it takes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from pyarrow import parquet

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.errors import RunError
from mai_thinking.experiments.pacing import WAYS, measured_problems, simulate
from mai_thinking.report.document import Document, Table
from mai_thinking.rl.schedule import Schedule, schedule_path
from mai_thinking.rl.traces import FOLDER
from mai_thinking.training.metrics import Record, read_records
from mai_thinking.training.model_files import load_model

_SCRIPT = Path(__file__).parents[2] / "scripts" / "grpo.py"
_KINDS = (("worker", 5), ("grader", 2), ("learner", 2), ("all", 1))
"""Whom to kill, and how many times in ten."""


class Run:
    """One run of scripts/grpo.py with its processes."""

    def __init__(self, command: Sequence[str], folder: Path, threads: int) -> None:
        self.command, self.folder, self.threads = [*command, f"output_dir={folder}"], folder, threads
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def finished(self) -> bool:
        """Whether its model is there."""
        return (self.folder / "final").is_dir()

    def start(self) -> None:
        """Begin, or go on."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.folder}.log", "ab") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
            self.process = subprocess.Popen(
                [sys.executable, str(_SCRIPT), *self.command], env=environment, stdout=log, stderr=log
            )

    def finish(self, *, until: int | None = None) -> None:
        """Start if need be, and wait for the end; or for step `until`, where it is stopped. RunError if it fails."""
        if self.finished:
            return
        if self.process is None or self.process.poll() is not None:
            self.start()
        assert self.process is not None
        while self.process.poll() is None:
            if until is not None and self.steps and self.steps[-1]["step"] >= until:
                self.process.send_signal(signal.SIGTERM)
                until = None
            time.sleep(0.2)
        if self.process.returncode not in (0, 75):
            raise RunError(f"{self.folder}: exit code {self.process.returncode}; see {self.folder}.log")

    @property
    def steps(self) -> list[Record]:
        """The records of its gradient steps."""
        return [r for r in read_records(self.folder / "metrics.jsonl") if "kind" not in r]

    def children(self) -> dict[str, list[int]]:
        """Process ids by kind, `learner` included."""
        assert self.process is not None
        found: dict[str, list[int]] = {"learner": [self.process.pid], "worker": [], "grader": []}
        parents = {self.process.pid}
        for pid, parent, command in sorted(_processes()):
            if parent in parents and "spawn_main" in command:
                found["worker"].append(pid)
                parents.add(pid)
        found["grader"] = [pid for pid, parent, command in _processes() if parent in parents and "grading" in command]
        return found

    def differences(self, other: "Run") -> int:
        """Tensors of the two last models that are not equal to the last bit."""
        mine, theirs = (load_model(run.folder / "final").state_dict() for run in (self, other))
        return sum(not torch.equal(mine[name], theirs[name]) for name in mine)


class Proof:
    """All parts, of one config."""

    def __init__(self, config: str, overrides: Sequence[str], work: Path, updates: int, max_staleness: int) -> None:
        checked = load_config(GrpoConfig, config, list(overrides))
        self.command = [config, *overrides, "collapse.enabled=false"]
        self.steps, self.per_update = updates * checked.rollouts.steps_per_update, checked.rollouts.steps_per_update
        self.work, self.max_staleness, self.config = work, max_staleness, checked

    def write(self, out: Path, *, exact: Sequence[int], blocks: int, kills: int, traces: Path | None) -> None:
        """Make what is not there yet, and the page. `traces`: the run whose lengths are simulated with."""
        numbers: dict[str, Any] = {"updates": self.steps // self.per_update, "max_staleness": self.max_staleness}
        if exact:
            numbers["staleness_0_differences"] = self.exact(exact)
        if blocks:
            numbers |= self.times(blocks)
        if kills:
            numbers |= self.faults(kills)
        simulated = self.simulated(traces or self.work / "time-1") if blocks else []
        page = Document(out.name)
        page.facts |= numbers
        page.add(Table(["figure", "value"], [[name, json.dumps(value)] for name, value in numbers.items()]).markdown())
        if simulated:
            rows = [list(row.values()) for row in simulated]
            page.add_table("simulated", Table(list(simulated[0]), rows), "Simulated, with the lengths of a run")
        page.write(out)

    def exact(self, workers: Sequence[int]) -> dict[str, int]:
        """By number of workers: tensors that differ from the run of one process, where nothing may be stale."""
        runs = {
            n: self._run(f"exact-{n}", [f"rollouts.workers={n}", "rollouts.max_staleness=0"]) for n in (0, *workers)
        }
        for run in runs.values():
            run.finish()
        return {str(n): runs[n].differences(runs[0]) for n in workers}

    def times(self, blocks: int) -> dict[str, Any]:
        """Seconds of a step in turns: one process with all threads, and a learner beside one worker."""
        threads = torch.get_num_threads()
        ahead = ["rollouts.workers=1", f"rollouts.max_staleness={self.max_staleness}"]
        sides = {"synchronous": self._run("time-0", [], threads), "asynchronous": self._run("time-1", ahead, threads)}
        for block in range(blocks):
            for run in sides.values():
                run.finish(until=(block + 1) * self.steps // blocks if block + 1 < blocks else None)
        first = {block * self.steps // blocks + skip for block in range(blocks) for skip in (1, 2)}
        steps = {side: [r for r in run.steps if r["step"] not in first] for side, run in sides.items()}
        seconds = {side: [r["seconds"] for r in rows] for side, rows in steps.items()}
        means, medians = ({side: f(values) for side, values in seconds.items()} for f in (fmean, median))
        stale = steps["asynchronous"]
        return {
            "seconds": means,
            "seconds_median": medians,
            # Of the whole time: beside a learner steps are short or long, as groups are there or not.
            "time_ratio": means["asynchronous"] / means["synchronous"],
            "time_ratio_median": medians["asynchronous"] / medians["synchronous"],
            "learner_idle": sum(r["idle/learner"] * r["seconds"] for r in stale) / sum(r["seconds"] for r in stale),
            "staleness": fmean(r["staleness"] for r in stale),
        }

    def simulated(self, run: Path) -> list[dict[str, Any]]:
        """Eight and 64 workers, of four problems each at a time, with the timed learner and the lengths of `run`."""
        timed = self.work / "time-1"
        steps = [r for r in read_records(timed / "metrics.jsonl") if "kind" not in r]
        arrived = [r for r in read_records(schedule_path(timed, 0)) if "arrived" in r]
        token = sum(r["seconds"] for r in arrived) / sum(_longest(timed, r["arrived"]) for r in arrived)
        learn = median(r["seconds"] - r["rollout_seconds"] for r in steps)
        problems, rows = measured_problems(run), []
        for workers in (8, 64):
            for staleness in (1, 2, 8):
                for way in WAYS:
                    found = simulate(
                        problems, way, slots=4 * workers, per_update=2 * workers, learn_seconds=learn,
                        token_seconds=token, max_staleness=staleness, updates=100, config=self.config,
                    )  # fmt: skip
                    row = {"workers": workers, "max_staleness": staleness, "way": way, "learner_waits": found.waits}
                    names = ("learned_longest", "learned_middle", "learned_shortest")
                    rows.append(row | dict(zip(names, found.learned, strict=True)))
        return rows

    def faults(self, kills: int) -> dict[str, Any]:
        """One run in which processes are killed at random; and its schedule done again undisturbed."""
        ahead = [f"rollouts.max_staleness={self.max_staleness}"]
        struck = self._run("struck", [*ahead, "rollouts.workers=2"])
        made: dict[str, list[int]] = {}
        record = self.work / "kills.json"
        if not struck.finished:
            done: dict[str, int] = dict.fromkeys((kind for kind, _ in _KINDS), 0)
            for kind in self._victims(kills):
                if not self._strike(struck, kind, made):
                    break
                done[kind] += 1
            struck.finish()
            twice = sum(len(set(times)) - 1 for times in made.values())
            record.write_text(json.dumps({"kills": done, "generated_twice": twice}))
        again = self._run("again", [*ahead, f"rollouts.replay={struck.folder}"])
        again.finish()
        arrived = sorted(arrival.number for arrival in Schedule(schedule_path(struck.folder, 0)).arrivals)
        return json.loads(record.read_text()) | {
            "batches": len(arrived),
            "rollouts_lost": self.config.rollouts.slots * len(set(range(arrived[-1] + 1)) - set(arrived)),
            "batches_learned_twice": len(arrived) - len(set(arrived)),
            "groups_stale": sum(r.get("groups_stale", 0) for r in struck.steps),
            "replay_differences": struck.differences(again),
        }

    def _victims(self, kills: int) -> Iterator[str]:
        draw = random.Random(19)
        kinds = [kind for kind, share in _KINDS for _ in range(round(share * kills / 10))]
        draw.shuffle(kinds)
        yield from kinds

    def _strike(self, run: Run, kind: str, made: dict[str, list[int]]) -> bool:
        """Let the run go on for a moment, and kill; whether it had not ended before."""
        if run.process is None or run.process.poll() is not None:
            run.start()
        before = len(run.steps)
        moment = time.monotonic() + random.Random(f"{kind} {before}").uniform(2, 10)
        while time.monotonic() < moment or not run.children()["worker"] or len(run.steps) == before == 0:
            assert run.process is not None
            if run.process.poll() is not None:
                return False
            for path in (run.folder / "rollouts").glob("batch-*"):
                with_time = made.setdefault(path.name, [])
                try:
                    with_time.append(path.stat().st_mtime_ns)
                except FileNotFoundError:  # no longer needed
                    continue
            time.sleep(0.1)
        found = run.children()
        victims = [pid for pids in found.values() for pid in pids] if kind == "all" else found[kind][:1]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if kind in ("learner", "all") and run.process is not None:
            run.process.wait()
        return True

    def _run(self, name: str, settings: Sequence[str], threads: int = 1) -> Run:
        return Run([*self.command, f"steps={self.steps}", f"name={name}", *settings], self.work / name, threads)


def _longest(run: Path, batch: int) -> int:
    """Tokens of a batch's longest response."""
    table = parquet.read_table(run / FOLDER / f"batch-{batch:08d}-rank-00000.parquet", columns=["response_ids"])
    return int(max(table["response_ids"].combine_chunks().value_lengths().to_pylist()))


def _processes() -> Iterator[tuple[int, int, str]]:
    """(id, parent's id, command) of all that run."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            yield int(path.name), parent, (path / "cmdline").read_bytes().decode(errors="replace")
        except (OSError, IndexError):
            continue
