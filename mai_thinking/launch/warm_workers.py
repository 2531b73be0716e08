"""Warm workers: a fork server that has already imported what the workers need (MAI-Thinking-1 report §2.8).

Importing torch, transformers and datasets takes longer than anything else in a restart. A worker that is forked from
it has them from the start. The server itself computes nothing, opens no device and starts no thread, so that
it is safe to fork. This module imports nothing heavy: it warms up while the launcher is still importing torch.
"""

import ast
import multiprocessing
import os
import runpy
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import TextIO, cast

from mai_thinking.training.process import die_with_parent

_ALWAYS = (
    "mai_thinking.training.warm_process",  # first, so that the server dies with its launcher from the start
    "torch",
    "torch.distributed",
    "torch.distributed.elastic.multiprocessing",
    "mai_thinking.launch.warm_workers",
)


def start_warm_workers(script: Path) -> None:
    """Start the fork server of this process, with everything imported that `script` imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_ALWAYS, *imports_of(script)])
    forkserver.ensure_running()


def imports_of(script: Path) -> list[str]:
    """The names of the modules that a script imports, at its top or in its functions, in the order of its lines."""
    nodes = ast.walk(ast.parse(script.read_text(encoding="utf-8"), str(script)))
    statements = sorted((n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)), key=lambda n: n.lineno)
    names: list[str] = []
    for statement in statements:
        if isinstance(statement, ast.Import):
            names.extend(alias.name for alias in statement.names)
        elif statement.module and statement.level == 0:
            names.append(statement.module)
    return names


def run_script(script: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Run `script` as `__main__` in this process, forked from the warm process, as one rank of a job.

    The process gets a group of its own: a Ctrl-C at the terminal goes to the launcher alone, which passes it on once,
    and the launcher can kill a rank together with all that it started.
    """
    die_with_parent()
    os.setpgrp()
    # The warm process ignores them; a script that wants to save first installs a `StopRequest`.
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        cast(TextIO, stream).reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
