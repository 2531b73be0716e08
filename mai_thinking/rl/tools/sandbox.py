"""Programs that a policy wrote, each run in a fresh process that can reach nothing. MAI-Thinking-1 report §3.3.

On Linux, x86-64, the kernel holds it: Landlock leaves it the standard library to read and no other file, a seccomp
filter leaves it the system calls that computing and printing need, and limits end it. It cannot open a socket, start a
process, send a signal or look into another one. Where the kernel has neither there are the limits alone, and
`isolation()` says so.
"""

import functools
import os
import platform
import selectors
import subprocess
import sys
import time
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
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(code.encode("utf-8", "replace"))
        process.stdin.close()
    except BrokenPipeError:
        pass
    output, ended = bytearray(), ""
    deadline = time.monotonic() + WAIT_FACTOR * seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not ended:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                ended = "took too long"
            elif not (part := os.read(process.stdout.fileno(), 65_536)):
                break
            else:
                output += part
                ended = "wrote too much" if len(output) > _OUTPUT else ""
    if ended:
        process.kill()
    try:
        code_of_exit = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        code_of_exit, ended = process.wait(), "took too long"
    process.stdout.close()
    text = output[:_OUTPUT].decode("utf-8", "replace")
    if not ended and code_of_exit:
        ended = "took too long" if code_of_exit < 0 else f"ended with exit code {code_of_exit}"
    return Outcome(text, ended)


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
