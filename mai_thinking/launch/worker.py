"""How a script is run as a rank."""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import TextIO, cast

from mai_thinking.training.process import die_with_parent


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
