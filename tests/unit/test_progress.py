"""Lines of progress for a log."""

from __future__ import annotations

import pytest

from unsharp import progress
from unsharp.progress import LineProgress


def test_a_log_learns_what_is_done_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    said: list[str] = []
    lines = LineProgress(said.append, every=30.0)
    lines.start("training", 1000, done=400)
    for _ in range(100):
        now += 0.6  # a minute for a hundred steps, so five for the five hundred that are left
        lines.advance()
    assert said[0] == "training: 1,000 steps, 400 of them done before"
    assert said[1:] == [
        "training: 450 of 1,000 steps, about 5.5 minutes left",
        "training: 500 of 1,000 steps, about 5.0 minutes left",
    ]
