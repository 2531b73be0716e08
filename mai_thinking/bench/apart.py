"""A side in a process of its own, so that no side lives in the memory that another has left.

What the C library keeps of freed memory, and where, decides how fast the next large tensor is had; beside another's
tensors the same products took up to one and a half times as long.
"""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from mai_thinking.bench.timing import Side, Turn, as_turn

PAUSE = 0.005
"""Seconds before a turn: threads of the side before it may still be waiting actively for more work."""


class Apart:
    """A process that makes sides and takes their turns when it is called. Use as a context manager."""

    def __init__(self, build: Callable[..., Side]) -> None:
        """`build` is a function of a module: the process imports it."""
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, far_end), daemon=True)
        self._process.start()
        far_end.close()

    def make(self, *arguments: Any) -> Side:
        """Build the side that has its turns from now on; what is called to take one."""
        self._ask(arguments)
        return lambda: self._ask(None)

    def _ask(self, question: Any) -> Turn | None:
        self._pipe.send(question)
        try:
            answer: Turn | None = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a side's process has died; its error stands above") from None
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


def _serve(build: Callable[..., Side], pipe: Connection) -> None:
    side: Side | None = None
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        if arguments is not None:
            side = None  # its memory is the next one's
            side = build(*arguments)
            pipe.send(None)
            continue
        assert side is not None
        time.sleep(PAUSE)
        begin = time.perf_counter()
        amount = side()
        seconds = time.perf_counter() - begin
        pipe.send(as_turn(seconds, amount))
