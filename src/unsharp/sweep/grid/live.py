"""A grid while it runs, and at its end: a table that fills on a terminal, lines for a log, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from unsharp.artifacts import open_run
from unsharp.stages import METRICS_FILE
from unsharp.sweep.cells import Result
from unsharp.sweep.grid.config import Grid
from unsharp.sweep.grid.forecast import Forecast, told_seconds
from unsharp.sweep.grid.plan import KINDS, Plan, kind_of
from unsharp.sweep.grid.table import figures

LINE_SECONDS = 30.0
NAMES = {"train": "trained", "retrain": "retrained", "unlearn": "cells"}
AROUND = 8
"""Lines of a terminal that a table needs beside its rows."""


class Watch:
    """Takes note of what ends, and shows nothing; the base of those that do. Use it as a context manager."""

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self, plan: Plan, forecast: Forecast) -> None:
        """Begin. Args: forecast: Asked for the time left; somebody else tells it what ends."""
        self.plan, self.forecast = plan, forecast
        self.total = {kind: sum(kind_of(cell) == kind for cell in plan.cells) for kind in KINDS}
        self.done: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.failed: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.values: dict[tuple[str, str], list[float]] = {}
        self.lost: dict[tuple[str, str], int] = {}
        self.last: str | None = None
        self.columns = columns_of(plan.grid)

    def ended(self, result: Result) -> None:
        """Take note of a cell that was found done or has ended."""
        counts = self.done if result.error is None else self.failed
        counts[kind_of(result.cell)] += 1
        job = self.plan.whose.get(result.cell.key)
        if job is None:
            return
        place = job.variant, column_of(self.plan.grid, job.forget, job.pretraining)
        self.last = job.variant
        if result.path is None:
            self.lost[place] = self.lost.get(place, 0) + 1
            return
        value = figures(open_run(result.path).json(METRICS_FILE)).get(self.plan.grid.outcome)
        if isinstance(value, int | float):
            self.values.setdefault(place, []).append(value)

    def stop(self) -> None:
        """End."""

    def line(self) -> str:
        """Where it stands, in a line."""
        parts = [f"{self.done[kind]} of {self.total[kind]} {NAMES[kind]}" for kind in KINDS]
        if failed := sum(self.failed.values()):
            parts.append(f"{failed} failed")
        left = self.forecast.seconds()
        ended = sum(self.done.values()) + sum(self.failed.values())
        if left is not None and ended < sum(self.total.values()):
            parts.append(f"about {told_seconds(left)} left")
        return ", ".join(parts)


class LineWatch(Watch):
    """Lines for a log, at most one in `every` seconds, and one at the end.

    Args:
        say: Takes a line.
        every: Seconds between two lines.
    """

    def __init__(self, say: Callable[[str], None], every: float = LINE_SECONDS) -> None:
        self._say, self._every, self._said = say, every, time.monotonic()
        self._news = False

    def ended(self, result: Result) -> None:
        super().ended(result)
        self._news = True
        if time.monotonic() - self._said >= self._every:
            self._tell()

    def stop(self) -> None:
        if self._news:
            self._tell()

    def _tell(self) -> None:
        self._said, self._news = time.monotonic(), False
        self._say(self.line())


class TableWatch(Watch):
    """A table of the outcome that fills while the grid runs, with the time left.

    Args:
        console: Of rich.
    """

    def __init__(self, console: Any) -> None:
        from rich.live import Live

        self._console = console
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=2, transient=True)
        self._started = False

    def start(self, plan: Plan, forecast: Forecast) -> None:
        super().start(plan, forecast)
        self._live.start()
        self._started = True

    def stop(self) -> None:
        if self._started:
            self._live.stop()
            self._started = False

    def render(self) -> Any:
        """The table, as far as it fits the terminal around what ended last, and the line below it."""
        from rich.console import Group
        from rich.text import Text

        if not hasattr(self, "last"):
            return Text("")
        rows = [(v, [self._cell((v, column)) for column in self.columns]) for v in self.plan.variants]
        room = max(1, self._console.size.height - AROUND)
        at = max(0, next((i for i, row in enumerate(rows) if row[0] == self.last), 0) - room // 2)
        shown = rows[min(at, max(0, len(rows) - room)) :][:room]
        more = "" if len(shown) == len(rows) else f"; {len(shown)} of {len(rows)} variants"
        title = f"{self.plan.grid.outcome}: mean over the seeds done{more}"
        return Group(_table(title, self.columns, shown), Text(self.line()))

    def _cell(self, place: tuple[str, str]) -> str:
        values, seeds = self.values.get(place, []), len(self.plan.grid.seeds)
        lost = f", {self.lost[place]} failed" if place in self.lost else ""
        return f"{_mean(values)} ({len(values)}/{seeds}{lost})"


def column_of(grid: Grid, forget: str, pretraining: str) -> str:
    """What the column of a forget set and a pretraining is called."""
    return forget if len(grid.pretraining) == 1 else f"{forget}, {pretraining}"


def columns_of(grid: Grid) -> list[str]:
    """All columns, in their order."""
    return [column_of(grid, forget, how) for how in grid.pretrainings() for forget in grid.forget_sets()]


def summary_table(grid: Grid, summary: Sequence[Mapping[str, Any]]) -> Any:
    """Mean and 95 % interval over seeds of each variant, as `summary_of` gives them, in a table of rich."""
    cells: dict[str, dict[str, str]] = {}
    for row in summary:
        half = "" if row["low"] is None else f" ± {(row['high'] - row['low']) / 2:.2f}"
        shown = "failed" if row["mean"] is None else f"{row['mean']:.2f}{half}"
        few = f" (n = {row['n']})" if row["missing"] and row["n"] else ""
        cells.setdefault(row["variant"], {})[column_of(grid, row["forget"], row["pretraining"])] = shown + few
    columns, n = columns_of(grid), len(grid.seeds)
    over = f"mean over {n} seeds ± half-width of the 95 % t interval" if n > 1 else "a single seed, no interval"
    title = f"{grid.outcome}: {over}"
    return _table(title, columns, [(v, [own[column] for column in columns]) for v, own in cells.items()])


def variants_table(variants: Sequence[Mapping[str, Any]]) -> Any:
    """What each variant is and takes, as `Plan.table` gives it, in a table of rich."""
    forget = list(variants[0]["passes"])
    rows = []
    for one in variants:
        passes = ["?" if one["passes"][f] is None else f"{one['passes'][f]:,.0f}" for f in forget]
        settings = ", ".join(f"{name}={value}" for name, value in one["settings"].items())
        rows.append((one["variant"], [one["method"], one["rule"], *passes, settings]))
    return _table("variants", ["method", "rule", *(f"passes, {f}" for f in forget), "settings"], rows)


def effects_table(grid: Grid, effects: Sequence[Mapping[str, Any]]) -> Any:
    """Each variant beside the baseline, as `effects_of` gives it, in a table of rich."""
    columns = ["on", "difference", "all 95 %", "p (Holm)"]
    rows = []
    for row in effects:
        together = "" if row["all_low"] is None else f"{row['all_low']:+.2f} to {row['all_high']:+.2f}"
        p = "" if row["p_adjusted"] is None else f"{row['p_adjusted']:.3g}"
        where = column_of(grid, row["forget"], row["pretraining"])
        rows.append((row["variant"], [where, f"{row['difference']:+.2f}", together, p]))
    family = effects[0]["family"] if effects else 0
    title = f"{grid.outcome} beside {grid.baseline!r}, paired over seeds; all {family} intervals cover together"
    return _table(title, columns, rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Any:
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("variant", overflow="fold")
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if _is_figure(rows, i) else "left", overflow="fold")
    for variant, cells in rows:
        table.add_row(escape(variant), *map(escape, cells))
    return Group(Text(title), table)  # a title of the table itself would be broken to its width


def _is_figure(rows: Sequence[tuple[str, Sequence[str]]], column: int) -> bool:
    return all(not cells[column][:1].isalpha() or cells[column] == "failed" for _, cells in rows)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}" if values else "·"
