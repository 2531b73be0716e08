"""The live line: step, loss, tokens per second, time left. A bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class ProgressLine:
    """Shows how a run goes. Only rank 0 shows; the others' calls do nothing.

    `update` may be called every step. `log` prints a line above the bar.
    """

    def __init__(self, steps: int, *, done: int, every: float, show: bool) -> None:
        self.steps, self.every, self.show = steps, every, show
        self.console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=50)
        self._last_print = 0.0
        self._bar: Progress | None = None
        if show and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=steps, completed=done, text="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, tokens: int, loss: float, note: str = "") -> None:
        """After step `step`, which brought the run to `tokens` tokens."""
        now = time.monotonic()
        self._recent.append((now, step, tokens))
        if not self.show:
            return
        text = f"loss {loss:.4f}  {self._rate()}  {note}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif now - self._last_print >= self.every or step == self.steps:
            self._last_print = now
            self.console.print(f"step {step}/{self.steps}  {text}")

    def _rate(self) -> str:
        first, last = self._recent[0], self._recent[-1]
        seconds, steps = last[0] - first[0], last[1] - first[1]
        if seconds <= 0 or steps <= 0:
            return ""
        left = (self.steps - last[1]) * seconds / steps
        return f"{(last[2] - first[2]) / seconds:,.0f} tokens/s  {duration(left)} left"

    def log(self, text: str) -> None:
        """Print a line of its own."""
        if self.show:
            self.console.print(text)


def duration(seconds: float) -> str:
    """`45s`, `12m30s`, `3h05m`, `2d04h`."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole}s"
    if hours < 1:
        return f"{minutes}m{whole % 60:02}s"
    return f"{hours}h{minutes % 60:02}m" if days < 1 else f"{days}d{hours % 24:02}h"
