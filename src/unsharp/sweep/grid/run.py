"""Runs a grid: what is shared first, then its cells; what is done is found, and the tables are written at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsharp import artifacts, config
from unsharp.errors import UserError
from unsharp.sweep import Backend, Cell, Result, local_backend, report, run_cells
from unsharp.sweep.cells import failed_before, finished
from unsharp.sweep.grid import table
from unsharp.sweep.grid.config import Given, Grid, grid_from, naming_source
from unsharp.sweep.grid.forecast import Forecast, told_seconds
from unsharp.sweep.grid.live import Watch
from unsharp.sweep.grid.plan import KINDS, Plan, counted, kind_of
from unsharp.sweep.local import carried

CELLS, LOCK_FILE, REPORT_FILE = "cells", ".lock", "report.html"
ORPHAN_SECONDS = 120.0
"""How long processes of a sweep that was killed may take to end: those of a Ray on a busy machine over a minute."""


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What became of a grid.

    Args:
        out: The directory.
        grid: What was asked for.
        rows: A row for each cell, in the order of the grid; the table of `results.csv`.
        summary: Mean and interval of the outcome over seeds, for each variant, forget set and pretraining.
        effects: Each variant beside the baseline; empty without one.
        failures: All failures in words; "" for none.
        n_failed: Cells that have no result: failed, died, or without the networks that they need.
        files: What was written.
    """

    out: Path
    grid: Grid
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    effects: list[dict[str, Any]]
    failures: str
    n_failed: int
    files: tuple[Path, ...]


def run_grid(
    grid: Given,
    out: str | Path,
    *,
    workers: int | None = None,
    threads: int = 1,
    accelerators: float | None = None,
    backend: Backend | None = None,
    retry_failed: bool = False,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Swept:
    """Run every cell of a grid that is not done yet, and write the tables; called again after a kill, it goes on.

    Args:
        grid: A TOML file; "package.module:function", or a function, that returns a grid; what stands in such a file, as
            a dictionary; or a `Grid`.
        out: Directory of all runs and of the tables. A grid that is larger or other finds there what it shares.
        workers: Processes at a time; None for as many as processors (with `threads` each) or accelerators carry.
        threads: Torch threads of each process.
        accelerators: How much of an accelerator each process of this machine gets, as `local_backend` takes it; None
            for one of its own where there are any.
        backend: Where cells run, as `unsharp.sweep.backend_from` gives it; None for processes of this machine.
        retry_failed: Try cells again whose own error ended them in an earlier call. Cells whose process was killed are
            tried again in any case.
        watch: Shows the grid while it runs; None shows nothing.
        say: Takes lines for the user.

    Returns:
        Rows, means, effects and failures. Failed cells stand in the rows with their error, and raise nothing.

    Raises:
        UserError: for a mistake in the grid, before any work, or where another sweep is at work in `out`.
        SweepError: if a process cannot start.

    Example:
        >>> found = unsharp.run_grid("grid.toml", "runs/grid")
        >>> pandas.DataFrame(found.rows).groupby(["variant", "forget"])["tow"].mean()
    """
    plan = _planned(grid)
    out = Path(out).absolute()
    work = _Work(plan, out, workers, threads, accelerators, backend, retry_failed=retry_failed, watch=watch, say=say)
    with _alone(out):
        return work.do()


def look_ahead(
    grid: Given,
    out: str | Path,
    *,
    workers: int | None = None,
    threads: int = 1,
    accelerators: float | None = None,
    backend: Backend | None = None,
) -> dict[str, Any]:
    """What `run_grid` would do, and what it would cost; nothing is written.

    Returns:
        "lines" for the user; "todo": cells to do, by kind; "done" and "failed": cells found done, and cells that failed
        before and are tried again on request; "passes" and "seconds" (roughly) of what is to be done, None where
        nothing can be told; "variants": method, rule, settings and passes of each.
    """
    plan = _planned(grid)
    return _Work(plan, Path(out).absolute(), workers, threads, accelerators, backend).outlook()


def _planned(grid: Given) -> Plan:
    settled = grid_from(grid)
    with naming_source(grid):
        return Plan(settled)


class _Work:
    """The sweep itself."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        workers: int | None,
        threads: int,
        accelerators: float | None,
        backend: Backend | None,
        *,
        retry_failed: bool = False,
        watch: Watch | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if workers is not None and workers < 1:
            raise UserError(f"workers must be at least 1, got {workers}")
        if backend is not None and accelerators is not None:
            raise UserError("accelerators: the backend says it already; leave it out here")
        self.plan, self.out, self.store = plan, out, out / CELLS
        self.workers, self.threads = workers, threads
        # Ray's machines are not known here.
        self.at_a_time = carried(threads, accelerators) if workers is None and backend is None else workers
        self.backend = backend or local_backend(accelerators=accelerators)
        self.retry_failed, self.watch, self.say = retry_failed, watch or Watch(), say
        self.results: dict[str, Result] = {}

    def do(self) -> Swept:
        """Run what is not done, write the tables."""
        done = _seconds_of_done(self.plan, self.store)
        for cell in self.plan.cells:
            if cell.key not in done:
                artifacts.wait_until_free(self.store / cell.key, ORPHAN_SECONDS)
        self.forecast, lines = self._forecast(done)
        for line in lines:
            self.say(line)
        with self.watch as watch:
            watch.start(self.plan, self.forecast)
            self._run(self.plan.shared)
            blocked = self._blocked()
            self._run([job.cell for job in self.plan.jobs if job.cell.key not in blocked])
        return self._written(blocked)

    def outlook(self) -> dict[str, Any]:
        """See `look_ahead`."""
        done, plan = _seconds_of_done(self.plan, self.store), self.plan
        forecast, lines = self._forecast(done)
        left = [cell for cell in plan.cells if cell.key not in done]
        failed = sum(failed_before(cell, self.store) is not None for cell in left)
        if failed:
            lines.append(f"{counted(failed, 'cells')} of these failed before; --retry-failed tries them again")
        return {
            "lines": lines,
            "todo": {kind: sum(kind_of(cell) == kind for cell in left) for kind in KINDS},
            "done": len(done),
            "failed": failed,
            "passes": sum(map(plan.weight, left)) if all(plan.passes[c.key] is not None for c in left) else None,
            "seconds": forecast.seconds(),
            "variants": plan.table(),
        }

    def _forecast(self, done: Mapping[str, float]) -> tuple[Forecast, list[str]]:
        """The forecast at the start, and lines that say what is to be done."""
        lines, left = self.plan.estimate(done), len(self.plan.cells) - len(done)
        timed = self.plan.seconds_per_pass() if left and not done else None
        forecast = Forecast(self.plan, done, self.at_a_time, at_first=timed)
        seconds = forecast.seconds()
        if left and seconds is not None:
            source = "from a pass timed here, without evaluations" if timed is not None else "from the cells done"
            lines.append(f"about {told_seconds(seconds)}, {self.at_a_time or 1} at a time ({source})")
        return forecast, lines

    def _run(self, cells: Sequence[Cell]) -> None:
        for result in run_cells(
            cells,
            self.store,
            workers=self.workers,
            threads=self.threads,
            backend=self.backend,
            retry_failed=self.retry_failed,
            told=self._told,
        ):
            self.results[result.cell.key] = result

    def _told(self, result: Result) -> None:
        if not result.reused:
            self.forecast.ended(result.cell, None if result.error is not None else result.seconds)
        self.watch.ended(result)

    def _blocked(self) -> dict[str, str]:
        """Why cells cannot be tried, by key; those that were done before need nothing."""
        found: dict[str, str] = {}
        for job in self.plan.jobs:
            lacking = [need for need in job.needs if self.results[need.key].error is not None]
            if lacking and finished(job.cell, self.store) is None:
                found[job.cell.key] = f"not tried: {self.plan.title(lacking[0])} failed"
                self.forecast.ended(job.cell, None)
        return found

    def _written(self, blocked: Mapping[str, str]) -> Swept:
        grid = self.plan.grid
        rows, times = table.rows_of(self.plan, self.results, blocked)
        summary = table.summary_of(rows, grid.outcome)
        effects = [] if grid.baseline is None else table.effects_of(rows, grid.outcome, grid.baseline)
        whole = {"grid": config.to_dict(grid), **self.plan.identity(), "summary": summary, "effects": effects}
        files = table.write_tables(self.out, rows, times, whole)
        facts = list(table.facts_of(self.plan, self.results))
        if facts:
            from unsharp.report import write_report

            write_report(self.out / REPORT_FILE, facts, title="Unlearning grid")
            files.append(self.out / REPORT_FILE)
        table.check_outcome(rows, grid.outcome)
        return Swept(
            out=self.out,
            grid=grid,
            rows=rows,
            summary=summary,
            effects=effects,
            failures=self._failures(blocked),
            n_failed=sum(row["status"] != "done" for row in rows),
            files=tuple(files),
        )

    def _failures(self, blocked: Mapping[str, str]) -> str:
        """All failures, each cell by its place in the grid."""
        named = [
            result if result.error is None else dataclasses.replace(result, shown=self.plan.title(result.cell))
            for result in self.results.values()
        ]
        lines = [failures] if (failures := report(named)) else []
        if blocked:
            lines.append(f"{counted(len(blocked), 'cells')} not tried, since a training that they need failed")
        return "\n".join(lines)


def _seconds_of_done(plan: Plan, store: Path) -> dict[str, float]:
    found = {cell.key: finished(cell, store) for cell in plan.cells}
    return {key: result.seconds for key, result in found.items() if result is not None}


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a directory for this sweep; the lock goes with the process, however it ends."""
    with artifacts.writing(out / LOCK_FILE):
        file = open(out / LOCK_FILE, "w")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another sweep is at work in {out}; wait for it, or give another --out") from None
        yield
