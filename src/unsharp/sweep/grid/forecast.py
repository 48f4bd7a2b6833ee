"""How long the rest of a grid will take, told from the cells that have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from unsharp.sweep import Cell
from unsharp.sweep.grid.plan import KINDS, Plan, kind_of


class Forecast:
    """The time left, from the seconds that cells took for each pass; those of a kind are alike.

    Args:
        plan: What is done.
        done: Seconds of each cell that was found done, by key.
        parallel: Processes at a time; None where nobody knows: then as many as finished work shows.
        at_first: Seconds of a pass, for as long as no cell has ended; None tells nothing until then.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self,
        plan: Plan,
        done: Mapping[str, float],
        parallel: int | None,
        *,
        at_first: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._parallel, self._at_first, self._clock = plan, parallel, at_first, clock
        self._left = {cell.key: cell for cell in plan.cells}
        self._seen = {kind: [0.0, 0.0] for kind in KINDS}
        """Seconds and weight of what has ended."""
        self._fresh = 0.0
        self._started = self._last = clock()
        for cell in plan.cells:
            if cell.key in done:
                self._count(cell, done[cell.key])

    def ended(self, cell: Cell, seconds: float | None) -> None:
        """Note the end of a cell; `seconds` of None for one that failed, which tells nothing of the others."""
        self._last = self._clock()
        if seconds is not None and cell.key in self._left:
            self._count(cell, seconds)
            self._fresh += seconds
        self._left.pop(cell.key, None)

    def _count(self, cell: Cell, seconds: float) -> None:
        seen = self._seen[kind_of(cell)]
        seen[0] += seconds
        seen[1] += self._plan.weight(cell)
        self._left.pop(cell.key, None)

    def seconds(self) -> float | None:
        """Seconds until all cells have ended; None where nothing is known yet."""
        whole = [sum(column) for column in zip(*self._seen.values())]
        usual = whole[0] / whole[1] if whole[1] else self._at_first
        if usual is None:
            return None
        rates = {kind: seconds / weight if weight else usual for kind, (seconds, weight) in self._seen.items()}
        work = sum(rates[kind_of(cell)] * self._plan.weight(cell) for cell in self._left.values())
        at_a_time = self._parallel or self._fresh / max(1e-9, self._last - self._started)
        # What runs now has come nearer to its end since the last one ended.
        return max(0.0, work / max(1.0, min(at_a_time, len(self._left))) - (self._clock() - self._last))


def told_seconds(seconds: float) -> str:
    """A duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
