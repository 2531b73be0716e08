"""Warm workers: a fork server that has already imported what the workers need (MAI-Thinking-1 report §2.8).

Importing torch, transformers and datasets takes longer than anything else in a restart. A worker that is forked from
it has them from the start. The server itself computes nothing, opens no device and starts no thread, so that
it is safe to fork. This module imports nothing heavy: it warms up while the launcher is still importing torch.
"""

import ast
import multiprocessing
from multiprocessing import forkserver
from pathlib import Path

_ALWAYS = (
    "mai_thinking.training.warm_process",  # first, so that the server dies with its launcher from the start
    "torch",
    "torch.distributed",
    "torch.distributed.elastic.multiprocessing",
    "mai_thinking.launch.worker",
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
