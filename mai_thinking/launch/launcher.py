"""Starts a script as several ranks on this machine, watches them, and restarts them when one dies or hangs.

The work is torch elastic's (`LocalElasticAgent`), which also gives the ranks the environment that torch.distributed and
Accelerate read. What is ours: workers are forked warm; a rank that is left behind is killed at once and
not asked to leave, unless it can save the run, which it does while its successors start; restarts are budgeted per
time; a job that is alive but does not move is restarted too; exit codes mean something. Several machines: the same
script under `torchrun --nnodes`.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from mai_thinking.config.command import EXIT_COLLAPSED, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, TOLD_VARIABLE
from mai_thinking.config.launch import LaunchSection, parse_faults
from mai_thinking.launch.chaos import Chaos
from mai_thinking.launch.warm_workers import run_script
from mai_thinking.training.ledger import (
    HEARTBEAT_VARIABLE,
    LAUNCHED_VARIABLE,
    read_heartbeat,
    seconds_since_process_start,
)
from mai_thinking.training.stop import SAVERS_VARIABLE

_POLL_SECONDS = 0.05


def launch(section: LaunchSection, script: Path, arguments: list[str]) -> int:
    """Run `script` with `arguments` as `section.nproc` ranks until it is done; the exit code of the whole job.

    0: done. 2: a rank refused its config or input (its line is on stderr). 75: stopped by SIGTERM, SIGHUP or Ctrl-C
    after saving. 3: the run has collapsed, and is saved. 1: given up, with the first failure's traceback on stderr.
    128 + signal: stopped without having saved.
    """
    _silence_elastic()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # `nohup` has it ignore that the terminal is gone
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
    with tempfile.TemporaryDirectory(prefix="mai-launch-") as scratch:
        agent = Agent(section, script, arguments, Path(scratch))
        chaos = Chaos(
            parse_faults(section.chaos),
            section.chaos_seed,
            agent.live_workers,
            lambda: read_heartbeat(agent.heartbeats, 0),
        )
        chaos.start()
        try:
            agent.run()
        except SignalException as stop:
            return agent.exit_code_after(stop.sigval)
        finally:
            chaos.stop()
            agent.kill_workers()
            agent.wait_for_savers()
        return agent.exit_code


class Failure(NamedTuple):
    """Why an attempt ended."""

    what: str
    """One line: "rank 1 died (SIGKILL)"."""
    traceback: str = ""


class Savers(NamedTuple):
    """Ranks that are left of an attempt, and save the run."""

    context: Any
    """Elastic's hold on the attempt's processes and their output."""
    pids: dict[int, int]
    """rank → process id."""
    heartbeats: Path
    """The attempt's."""
    deadline: float

    def done(self) -> bool:
        """Whether all have saved, or died, or their time is up."""
        alive = {process.pid for process in self.context._pc.processes if process.is_alive()}
        saving = any(pid in alive and _can_save_jit(self.heartbeats, rank) for rank, pid in self.pids.items())
        return not saving or time.monotonic() > self.deadline

    def end(self) -> None:
        """Kill what is left, and let go of it."""
        _kill(self.context._pc.processes)
        self.context.close(signal.SIGKILL)


class Agent(LocalElasticAgent):
    """Torch elastic's agent for one machine, with the differences that the module's docstring names."""

    def __init__(self, section: LaunchSection, script: Path, arguments: list[str], scratch: Path):
        self.section = section
        self.exit_code = 0
        self.heartbeats = self._scratch = scratch
        """The folder of this attempt's heartbeats."""
        self._told_once = {LAUNCHED_VARIABLE: str(time.time() - seconds_since_process_start())}
        self._arguments = (str(script), arguments)
        self._attempt_began = time.time()
        self._restart_times: list[float] = []
        self._fruitless = 0
        self._furthest: Counter[str] = Counter()  # by run: a job may have several, one after the other
        self._first_failure: Failure | None = None  # of those since the last new step
        self._savers: list[Savers] = []
        spec = WorkerSpec(
            role="rank",
            local_world_size=section.nproc,
            entrypoint=run_script,
            rdzv_handler=LocalRendezvous(),
            max_restarts=sys.maxsize,  # the budget is ours
            monitor_interval=_POLL_SECONDS,
        )
        # Rank 0 writes to the terminal itself, its live line included; the others' lines are marked.
        logs = DefaultLogsSpecs(log_dir=str(scratch / "logs"), tee=dict.fromkeys(range(1, section.nproc), Std.ALL))
        super().__init__(
            spec,
            logs,
            start_method="forkserver",
            log_line_prefix_template="[rank ${rank}] ",
            shutdown_timeout=int(section.grace_seconds),
        )

    # -------------------------------------------------------------------------------------- torch elastic's hooks

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.heartbeats = Path(tempfile.mkdtemp(prefix="heartbeats-", dir=self._scratch))
        environment = {
            HEARTBEAT_VARIABLE: str(self.heartbeats),
            TOLD_VARIABLE: str(self._scratch),
            SAVERS_VARIABLE: " ".join(str(pid) for some in self._savers for pid in some.pids.values()),
            **self._told_once,
        }
        worker_group.spec.args = (*self._arguments, environment)
        self._attempt_began = time.time()
        return super()._start_workers(worker_group)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        """Elastic would ask with SIGTERM and wait; a rank whose peer is gone cannot answer."""
        self.kill_workers()
        super()._stop_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._let_go_of_savers()
        codes = self._exit_codes()
        if any(codes.values()):
            failure = self._end_attempt(codes)
        elif idle := self._seconds_too_long():
            stopped = {rank: pid for rank, pid in self.live_workers().items() if _is_stopped(pid)}
            failure = Failure(f"no step for {idle:.0f} s; stopped ranks: {', '.join(map(str, stopped)) or 'none'}")
            for pid in stopped.values():  # so that those that wait for them notice
                os.kill(pid, signal.SIGKILL)
            if stopped:
                self._set_savers_aside()
        else:
            result: RunResult = super()._monitor_workers(worker_group)
            if result.state != WorkerState.FAILED:
                return result
            failure = self._end_attempt(self._exit_codes())  # died between the two looks
        if self.exit_code or not self._may_restart(failure):
            self._remaining_restarts = 0
        return RunResult(state=WorkerState.FAILED)

    def _record_worker_events(self, result: RunResult) -> None:
        """Elastic's event log has no reader here."""

    # ------------------------------------------------------------------------------------------------- workers

    def live_workers(self) -> dict[int, int]:
        """rank → process id, of the workers that are running."""
        return {rank: process.pid for rank, process in self._processes().items() if process.is_alive()}

    def kill_workers(self) -> None:
        """SIGKILL every worker but the savers, with all that it started. Works on stopped ones too."""
        _kill(self._processes().values())

    def wait_for_savers(self) -> None:
        """Until all have saved, or their time is up."""
        while self._savers:
            time.sleep(_POLL_SECONDS / 5)
            self._let_go_of_savers()

    def exit_code_after(self, name: signal.Signals) -> int:
        """The job's exit code when this process was told to stop by the signal `name`."""
        codes = set(self._exit_codes().values())
        if codes == {0}:
            return 0
        if codes == {EXIT_INTERRUPTED}:
            return EXIT_INTERRUPTED
        _log(f"stopped by {name.name} before the workers had saved")
        return 128 + int(name)

    def _processes(self) -> dict[int, Any]:
        context = getattr(self._pcontext, "_pc", None)
        return dict(enumerate(context.processes)) if context else {}

    def _exit_codes(self) -> dict[int, int | None]:
        """rank → exit code, negative for a signal, None while it runs."""
        return {rank: process.exitcode for rank, process in self._processes().items()}

    # ------------------------------------------------------------------------------------------------- verdicts

    def _end_attempt(self, codes: dict[int, int | None]) -> Failure:
        """A rank has ended, and not well: let the others end too, and say why."""
        if saved := {EXIT_INTERRUPTED, EXIT_COLLAPSED}.intersection(filter(None, codes.values())):
            self._wait_for_workers(self.section.grace_seconds)
            self.exit_code = max(saved)
        elif EXIT_USAGE in codes.values():
            self.exit_code = EXIT_USAGE
        failure = self._first_cause(codes)
        if not self.exit_code:
            self._set_savers_aside()
        self.kill_workers()
        return failure

    def _first_cause(self, codes: dict[int, int | None]) -> Failure:
        """When one rank dies the others soon fail in talking to it: of several failures, a signal comes before an
        exception, and the earliest exception before the others."""
        failed = {rank: code for rank, code in codes.items() if code}
        for rank, code in failed.items():
            if code < 0:
                return Failure(f"rank {rank} died ({signal.Signals(-code).name})")
        errors = [(*self._read_error(rank), rank) for rank in failed]
        _, message, traceback, rank = min(errors)
        return Failure(f"rank {rank} failed: {message or f'exit code {failed[rank]}'}", traceback)

    def _read_error(self, rank: int) -> tuple[float, str, str]:
        """(Unix time, message, traceback) of the exception that ended a rank, as elastic's `record` left them."""
        assert self._pcontext is not None
        try:
            error = json.loads(Path(self._pcontext.error_files[rank]).read_text())["message"]
            details = error["extraInfo"]
            return float(details["timestamp"]), error["message"], details["py_callstack"]
        except (OSError, ValueError, KeyError, TypeError):
            return float("inf"), "", ""

    def _may_restart(self, failure: Failure) -> bool:
        """Announce the failure, and the restart or the end. False ends the job."""
        before = self._furthest.copy()
        for _, beat in filter(None, self.beats()):
            self._furthest |= Counter({beat["output_dir"]: beat["step"]})  # the larger of both
        if self._furthest != before:
            self._fruitless, self._first_failure = 0, None
        else:
            self._fruitless += 1
        now = time.monotonic()
        self._restart_times = [when for when in self._restart_times if now - when < self.section.window_seconds]
        self._restart_times.append(now)
        if self._first_failure is None:
            self._first_failure = failure
            if failure.traceback:
                print(failure.traceback, file=sys.stderr, end="", flush=True)
        if self._fruitless > self.section.fruitless_restarts:
            return self._give_up(f"{self._fruitless} restarts in a row reached no new step")
        if len(self._restart_times) > self.section.restarts:
            return self._give_up(f"more than {self.section.restarts} failures in {self.section.window_seconds:g} s")
        _log(f"{failure.what}; restarting from the newest good checkpoint")
        self._told_once = {}
        return True

    def _give_up(self, why: str) -> bool:
        assert self._first_failure is not None
        _log(f"giving up: {why}. The first failure was: {self._first_failure.what}")
        print(self._first_failure.traceback, file=sys.stderr, end="", flush=True)
        self.exit_code = EXIT_FAILED
        return False

    def _seconds_too_long(self) -> float | None:
        """How long the job has not moved, if that is longer than it may be."""
        beats = self.beats()
        moved = min(beat[0] if beat else self._attempt_began for beat in beats)
        under_way = all(beat is not None and beat[1]["step"] > 0 for beat in beats)  # each has made a step
        idle = time.time() - moved
        return idle if idle > (self.section.hang_seconds if under_way else self.section.start_seconds) else None

    def beats(self) -> list[tuple[float, dict[str, Any]] | None]:
        """Each rank's last heartbeat."""
        return [read_heartbeat(self.heartbeats, rank) for rank in range(self.section.nproc)]

    def _set_savers_aside(self) -> None:
        """Workers that are left and can save without the others (`JitCheckpoint`) do so while their successors
        start: those wait for them before they touch the run (`training.stop.wait_for_savers`)."""
        if not self.section.jit_seconds:
            return
        if pids := {r: pid for r, pid in self.live_workers().items() if _can_save_jit(self.heartbeats, r)}:
            _kill(process for process in self._processes().values() if process.pid not in pids.values())
            deadline = time.monotonic() + self.section.jit_seconds
            self._savers.append(Savers(self._pcontext, pids, self.heartbeats, deadline))
            self._pcontext = None

    def _let_go_of_savers(self) -> None:
        """Of those that are done. What they do after that is of no use: their peers are gone."""
        for some in [some for some in self._savers if some.done()]:
            some.end()
            self._savers.remove(some)

    def _wait_for_workers(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.live_workers() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


class LocalRendezvous(StaticTCPRendezvous):
    """One agent needs nobody to meet, only a store for its workers: a new one, at a new port, for each attempt. In an
    old one the workers would find the addresses of their dead predecessors."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", 0, rank=0, world_size=1, run_id="launch", timeout=60)

    def next_rendezvous(self) -> RendezvousInfo:
        self._store = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.master_port = probe.getsockname()[1]
        return super().next_rendezvous()


def _can_save_jit(heartbeats: Path, rank: int) -> bool:
    beat = read_heartbeat(heartbeats, rank)
    return beat is not None and beat[1]["can_save_jit"]


def _kill(processes: Iterable[Any]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # all gone, or so young that it has no group yet
            os.killpg(process.pid, signal.SIGKILL)
        if process.is_alive():
            process.kill()


def _is_stopped(pid: int) -> bool:
    """Whether a process does not run at all, which tells it from one that waits."""
    with contextlib.suppress(OSError):
        return "\nState:\tT (stopped)\n" in Path(f"/proc/{pid}/status").read_text()
    return False


def _silence_elastic() -> None:
    """Elastic logs each restart with tracebacks of its own; the launcher says the same in a line."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _log(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
