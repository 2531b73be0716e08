"""Programs that a policy wrote, each run in a fresh process that can reach nothing. MAI-Thinking-1 report §3.3.

On Linux, x86-64, the kernel holds it: Landlock leaves it the standard library to read and no other file, a seccomp
filter leaves it the system calls that computing and printing need, and limits end it. It cannot open a socket, start a
process, send a signal or look into another one. Where the kernel has neither there are the limits alone, and
`isolation()` says so.
"""

import contextlib
import functools
import platform
import subprocess
import sys
import threading
from dataclasses import dataclass

from mai_thinking.rl.tools import sandbox_child

WAIT_FACTOR = 10
"""Wall-clock time of a call, as a multiple of its processor time: a busy machine must not end a right program."""
_OUTPUT = 65_536
"""Bytes of output that are read; a program that writes more is ended."""


@dataclass(frozen=True)
class Outcome:
    """What a program did."""

    output: str
    """Of standard output and standard error together; bytes that are no UTF-8 are replaced."""
    failed: str = ""
    """Why it was ended, or that it failed; empty if it came to its end."""


def run_python(code: str, *, seconds: float, megabytes: int, locked: bool = True) -> Outcome:
    """Run a program with so much processor time and memory, in a process of its own that ends with it; `locked`: in the
    kernel's hold, or not at all."""
    child = [sandbox_child.__file__, str(seconds), str(megabytes), str(locked)]
    process = subprocess.Popen(
        [sys.executable, *["-P", "-s", "-S", "-X", "utf8"], *child],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PYTHONHASHSEED": "0"},  # the same program prints the same sets
        cwd="/",
        start_new_session=True,
    )
    timer = threading.Timer(WAIT_FACTOR * seconds, process.kill)
    timer.start()
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(code.encode("utf-8", "replace"))
        output = process.stdout.read(_OUTPUT + 1)
        if len(output) > _OUTPUT:
            process.kill()
        code_of_exit = process.wait()
    timer.cancel()
    ended = "wrote too much" if len(output) > _OUTPUT else "took too long" if code_of_exit < 0 else ""
    if code_of_exit > 0 and not ended:
        ended = f"ended with exit code {code_of_exit}"
    return Outcome(output[:_OUTPUT].decode("utf-8", "replace"), ended)


@functools.cache
def isolation() -> str:
    """What is missing of the isolation on this machine, in words; empty if nothing is."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"programs of the tool `python` are not isolated on {platform.system()} {platform.machine()}"
    probe = run_python("open('/proc/version').read()", seconds=5.0, megabytes=256)
    if "PermissionError" in probe.output:
        return ""
    return (
        f"programs of the tool `python` are not isolated: this kernel ({platform.release()}) has no Landlock or seccomp"
    )
