"""Progress of long work: a bar with the remaining time on standard error, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any


class Progress:
    """Takes note of progress and shows nothing; the base of those that do."""

    def start(self, label: str, total: int, done: int = 0) -> None:
        """Begin a piece of work of `total` steps, of which `done` are finished already."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more steps."""

    def finish(self) -> None:
        """End the piece of work."""

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Take note of figures: a row of the history after epoch `step`, or an evaluation."""


SILENT = Progress()


def duration(seconds: float) -> str:
    """So many seconds in the unit that a person would take."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.{1 if seconds < 600 else 0}f} minutes"
    return f"{seconds / 3600:.1f} hours"


class LineProgress(Progress):
    """Lines for a log: what is to be done when it starts, and now and then how long it will take.

    Args:
        say: Takes a line.
        every: Seconds between two lines.
    """

    def __init__(self, say: Callable[[str], None], every: float = 30.0) -> None:
        self._say, self._every = say, every
        self._label, self._total, self._done, self._fresh = "", 0, 0, 0
        self._started = self._said = 0.0

    def start(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._done, self._fresh = label, total, done, 0
        self._started = self._said = time.monotonic()
        self._say(f"{label}: {total:,} steps" + (f", {done:,} of them done before" if done else ""))

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done, self._fresh = self._done + n, self._fresh + n
        now = time.monotonic()
        if now - self._said >= self._every:
            self._said = now
            left = (now - self._started) / self._fresh * (self._total - self._done)
            self._say(f"{self._label}: {self._done:,} of {self._total:,} steps, about {duration(left)} left")


class BarProgress(Progress):
    """A bar with the remaining time, on standard error; use it as a context manager."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def __enter__(self) -> BarProgress:
        self._rich.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._rich.stop()

    def start(self, label: str, total: int, done: int = 0) -> None:
        self._task = self._rich.add_task(label, total=total, completed=done, note="")

    def advance(self, n: int = 1, note: str = "") -> None:
        if self._task is not None:
            self._rich.advance(self._task, n)
            if note:
                self._rich.update(self._task, note=note)

    def finish(self) -> None:
        if self._task is not None:
            task = self._rich.tasks[self._rich.task_ids.index(self._task)]
            self._rich.update(self._task, completed=task.total)
            self._task = None
