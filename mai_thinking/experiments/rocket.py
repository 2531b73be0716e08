"""The proof of asynchronous RL (MAI-Thinking-1 report §3.6): exact where nothing is stale, the same again by its
schedule where something is, nothing lost when processes die, and the time that it takes. Each part is a few runs."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.config.shipped import SCRIPTS
from mai_thinking.experiments.climb_run import ClimbRun
from mai_thinking.experiments.pacing import WAYS, measured_problems, seconds_of_a_token, shares_by_size, simulate
from mai_thinking.launch.goodput import account_of
from mai_thinking.rl.schedule import Schedule, schedule_path
from mai_thinking.training.metrics import Record

_KINDS = (("worker", 5), ("grader", 2), ("learner", 2), ("all", 1))
"""Whom to kill, and how many times in ten."""
_Found = dict[str, Any]
"""Figures by name; a list of dictionaries is a table."""


class Proof:
    """The runs of all parts, of one config, below the folder `work`; one that is finished is not done again."""

    def __init__(self, config: str, overrides: Sequence[str], work: Path, updates: int, max_staleness: int) -> None:
        self.config = load_config(GrpoConfig, config, list(overrides))
        self.command = [config, *overrides, "collapse.enabled=false"]
        self.per_update = self.config.rollouts.steps_per_update
        self.steps = updates * self.per_update
        self.work, self.updates, self.max_staleness = work, updates, max_staleness
        self.ahead = [f"rollouts.max_staleness={max_staleness}"]
        self.runs: list[ClimbRun] = []

    def exact(self, workers: Sequence[int]) -> _Found:
        """By number of workers: tensors that differ from the run of one process, where nothing may be stale."""
        runs = {
            n: self._run(f"exact-{n}", [f"rollouts.workers={n}", "rollouts.max_staleness=0"]) for n in (0, *workers)
        }
        for run in runs.values():
            run.finish()
        return {
            "staleness_0_updates": self.updates,
            "staleness_0_tensors": len(runs[0].weights()),
            "staleness_0_differences": {str(n): runs[n].differences(runs[0]) for n in workers},
        }

    def time(self, blocks: int) -> _Found:
        """Seconds of a step in turns: one process with all threads, and a learner beside one worker."""
        threads = len(os.sched_getaffinity(0))
        ahead = ["rollouts.workers=1", *self.ahead]
        sides = {"synchronous": self._run("time-0", [], threads), "asynchronous": self._run("time-1", ahead, threads)}
        steps = self._in_turns(sides, blocks)
        seconds = {side: [r["seconds"] for r in rows] for side, rows in steps.items()}
        means, medians = ({side: f(values) for side, values in seconds.items()} for f in (fmean, median))
        stale = steps["asynchronous"]
        whole = sum(r["seconds"] for r in stale)
        return {
            "timed_updates": self.updates,
            "seconds": means,
            "seconds_median": medians,
            # Of the whole time: beside a learner steps are short or long, as groups are there or not.
            "time_ratio": means["asynchronous"] / means["synchronous"],
            "time_ratio_median": medians["asynchronous"] / medians["synchronous"],
            "learner_idle": sum(r["idle/learner"] * r["seconds"] for r in stale) / whole,
            "learner_generates": sum(r.get("generation_seconds", 0.0) for r in stale) / whole,
            "worker_idle": fmean(r["idle/workers"] for r in stale if "idle/workers" in r),
            "staleness": fmean(r["staleness"] for r in stale),
        }

    def faults(self, kills: int) -> _Found:
        """One run in which processes are killed at random; and its schedule done again undisturbed."""
        struck = self._run("struck", [*self.ahead, "rollouts.workers=2"])
        record = self.work / "kills.json"
        if not struck.finished:
            victims = [kind for kind, share in _KINDS for _ in range(round(share * kills / 10))]
            random.Random(19).shuffle(victims)
            killer = _Killer(struck, self.steps, victims)
            made: dict[str, set[int]] = {}

            def beside() -> None:
                killer()
                for path in (struck.folder / "rollouts").glob("batch-*"):
                    with contextlib.suppress(FileNotFoundError):  # no longer needed
                        made.setdefault(path.name, set()).add(path.stat().st_mtime_ns)

            while not struck.finished:
                struck.finish(beside=beside, ends=(0, 75, -signal.SIGKILL))
            twice = sum(len(times) - 1 for times in made.values())
            record.write_text(json.dumps({"kills": killer.done, "generated_twice": twice}))
        again = self._run("again", [*self.ahead, f"rollouts.replay={struck.folder}"])
        again.finish()
        arrived = sorted(arrival["arrived"] for arrival in Schedule(schedule_path(struck.folder, 0)).arrivals)
        return json.loads(record.read_text()) | {
            "faults_updates": self.updates,
            "faults_max_staleness": self.max_staleness,
            "batches": len(arrived),
            "rollouts_lost": self.config.rollouts.slots * len(set(range(arrived[-1] + 1)) - set(arrived)),
            "batches_learned_twice": len(arrived) - len(set(arrived)),
            "groups_stale": sum(r.get("groups_stale", 0) for r in struck.steps),
            "replay_differences": struck.differences(again),
        }

    def deaths(self, kills: int, blocks: int) -> _Found:
        """Updates a second of a run whose workers are killed, in turns with one that is left alone."""
        settings = [*self.ahead, "rollouts.workers=2"]
        sides = {"undisturbed": self._run("calm", settings), "struck": self._run("deaths", settings)}
        killer = _Killer(sides["struck"], self.steps, ["worker"] * kills)
        steps = self._in_turns(sides, blocks, killer)
        rates = {side: len(rows) / sum(r["seconds"] for r in rows) / self.per_update for side, rows in steps.items()}
        text = Path(f"{sides['struck'].folder}.log").read_text()
        return {
            "deaths_updates": self.updates,
            "deaths": text.count("died; others answer for it"),
            "updates_per_second": rates,
            "updates_under_deaths": rates["struck"] / rates["undisturbed"],
        }

    def shares(self) -> _Found:
        """Of the groups worth learning from, the share that was learned from, by the problems' size: where workers are
        paced, and where what has become too old is thrown away."""
        found: dict[str, list[Record]] = {}
        for way, under in (("pacing", ()), ("dropping", ("-m", "mai_thinking.experiments.without", "pacing"))):
            run = self._run(f"shares-{way}", [*self.ahead, "rollouts.workers=2"], under=under)
            run.finish()
            found[way] = shares_by_size(run.folder, self.config, self.max_staleness)
        rows: list[Record] = []
        for size in sorted({row["size"] for side in found.values() for row in side}):
            rows.append({"size": size})
            for way, side in found.items():
                own = next((row for row in side if row["size"] == size), {"groups": 0})
                rows[-1] |= {f"{name} {way}": own.get(name) for name in ("groups", "response_length", "learned")}
        return {"shares_updates": self.updates, "shares_max_staleness": self.max_staleness, "learned_by_size": rows}

    def jit(self, kills: int) -> _Found:
        """Two ranks, of which one is killed `kills` times: where the other one saves just in time, and where, sharded,
        there are only checkpoints on a schedule."""
        rows: list[Record] = []
        for name, parallel in (("before", "fsdp"), ("after", "ddp")):
            under = [str(SCRIPTS / "launch.py"), "--nproc", "2", "--restarts", "1000"]
            run = self._run(f"jit-{parallel}", [f"execution.parallel={parallel}"], under=under)
            run.finish(beside=_Killer(run, self.steps, ["worker"] * kills))  # its launcher's workers are the ranks
            account = account_of(run.folder)
            row = {"just_in_time": name, "parallel": parallel, "restarts": len(account.recoveries)}
            row |= {"from_a_rank_that_was_left": account.rescued, "recovery_seconds": fmean(account.recoveries)}
            rows.append(row | {"steps": account.steps, "steps_computed_again": account.recomputed_steps})
        return {"jit": rows, "jit_checkpoint_every": self.config.checkpoint.every}

    def simulated(self, lengths: Path | None) -> _Found:
        """Eight and 64 workers, of four problems each at a time, with the learner that was timed, on a virtual clock
        with the lengths of the run `lengths`."""
        timed = ClimbRun([], self.work / "time-1")
        token = seconds_of_a_token(timed.folder)
        learn = median(r["seconds"] - r["rollout_seconds"] for r in timed.steps)
        problems, rows = measured_problems(lengths or timed.folder), []
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
        return {"simulated": rows}

    def _in_turns(
        self, sides: dict[str, ClimbRun], blocks: int, killer: "_Killer | None" = None
    ) -> dict[str, list[Record]]:
        """Steps by side, of runs that took turns, without the first two of each turn."""
        for block in range(blocks):
            for run in sides.values():
                until = (block + 1) * self.steps // blocks if block + 1 < blocks else None
                run.finish(until=until, beside=killer if killer is not None and killer.run is run else None)
        first = {block * self.steps // blocks + skip for block in range(blocks) for skip in (1, 2)}
        return {side: [r for r in run.steps if r["step"] not in first] for side, run in sides.items()}

    def _run(self, name: str, settings: Sequence[str], threads: int = 1, under: Sequence[str] = ()) -> ClimbRun:
        command = [*self.command, f"steps={self.steps}", f"name={name}", *settings]
        self.runs.append(ClimbRun(command, self.work / name, threads, under))
        return self.runs[-1]


class _Killer:
    """Kills one of `victims` after the other, in even distances of a run of `steps`; to be called often."""

    def __init__(self, run: ClimbRun, steps: int, victims: Sequence[str]) -> None:
        self.run, self.draw, self.done = run, random.Random(19), dict.fromkeys(victims, 0)
        moments = [steps * (n + 0.5) / len(victims) for n in range(len(victims))]
        self._left = [pair for pair in zip(moments, victims, strict=True) if pair[0] > len(run.steps)]
        self._step, self._since, self._seconds = len(run.steps), time.monotonic(), 0.0

    def __call__(self) -> None:
        step, now = len(self.run.steps), time.monotonic()
        if step > self._step:
            self._seconds = (now - self._since) / (step - self._step)
            self._step, self._since = step, now
        progress = step + min(0.99, (now - self._since) / self._seconds) if self._seconds else step
        if not self._left or progress < self._left[0][0]:
            return
        kind, found = self._left[0][1], self.run.processes()
        of_kind = [pid for pids in found.values() for pid in pids] if kind == "all" else found[kind]
        if not found["worker"] or not of_kind:
            return  # it has only begun
        for pid in of_kind if kind == "all" else [self.draw.choice(of_kind)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.done[kind] += 1
        self._left.pop(0)
