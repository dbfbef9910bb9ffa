"""How far a long command is: a bar on a terminal, elsewhere a few plain lines; on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

LINES = 10  # at least so many parts between plain lines
SECONDS = 5.0  # between plain lines


class Progress:
    """Called with a text and the part done, from 0 to 1; a context manager."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: Any = None
        self._said = -1.0
        self._at = 0.0

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as Bar
            from rich.progress import TimeRemainingColumn as Remaining

            columns = (
                BarColumn(20),
                TaskProgressColumn(),
                Remaining(),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=what)
            return
        now = time.monotonic()
        if (now - self._at >= SECONDS and (done - self._said) * LINES >= 1) or self._said < 0:
            self._at, self._said = now, done
            print(f"{self._name}: {done:.0%}, {what}", file=sys.stderr, flush=True)
