"""Following a run in an experiment tracker; off unless the user asks for one.

What is told: the row of figures after each epoch, and the figures of an evaluation. No sample, id, path or weight is.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from unsharp import runtime
from unsharp.errors import UserError, unknown
from unsharp.progress import Progress

Tracker = Literal["tensorboard", "trackio", "wandb"]
LOCAL = Path("runs") / "tensorboard"
"""Where TensorBoard's files go; the others decide that for themselves."""


class TrackedProgress(Progress):
    """Shows what another shows, and hands figures to a tracker besides.

    Args:
        shown: What the user sees.
        tracker: Takes figures by `log(values, step=...)`.
    """

    def __init__(self, shown: Progress, tracker: Any) -> None:
        self._shown, self._tracker = shown, tracker

    def start(self, label: str, total: int, done: int = 0) -> None:
        self._shown.start(label, total, done)

    def advance(self, n: int = 1, note: str = "") -> None:
        self._shown.advance(n, note)

    def finish(self) -> None:
        self._shown.finish()

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._tracker.log(dict(values), step=step)


@contextlib.contextmanager
def tracked(shown: Progress, name: str | None, project: str = "unsharp") -> Generator[Progress, None, None]:
    """The progress, with figures handed to a tracker where one is named; the tracker is closed at the end.

    Args:
        shown: What the user sees.
        name: "tensorboard" (files under runs/tensorboard), "trackio" (files of this machine) or "wandb" (sent to where
            its own settings say); None tracks nothing.
        project: What the tracker calls the project.

    Raises:
        UserError: for an unknown name, or if its package is not installed.
    """
    if name is None or runtime.world()[0]:  # one of several processes tells
        yield shown
        return
    tracker = _started(name, project)
    try:
        yield TrackedProgress(shown, tracker)
    finally:
        tracker.finish()


def _started(name: str, project: str) -> Any:
    if name not in get_args(Tracker):
        raise unknown("tracker", name, get_args(Tracker))
    for package in ("accelerate", name):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--track {name} needs the package {package}: pip install {package}")
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    made = LOGGER_TYPE_TO_CLASS[name]
    tracker = made(project, logging_dir=LOCAL) if made.requires_logging_directory else made(project)
    tracker.start()
    return tracker


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers of nested results, by names joined with slashes."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[before + key] = float(value)
    return found
