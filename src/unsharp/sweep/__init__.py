"""Sweeps: a list of cells, each done once, by processes that may be killed at any moment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from unsharp import artifacts
from unsharp.errors import UserError, unknown
from unsharp.progress import SILENT, Progress
from unsharp.sweep.cells import (
    Cell,
    Failure,
    Result,
    SweepError,
    failed_before,
    finished,
    report,
    run_cell,
    written_down,
)
from unsharp.sweep.local import local_backend, run_local
from unsharp.sweep.ray import ray_backend

__all__ = [
    "BACKENDS",
    "Backend",
    "Cell",
    "Failure",
    "Result",
    "SweepError",
    "backend_from",
    "local_backend",
    "ray_backend",
    "report",
    "run_cell",
    "run_cells",
    "run_local",
]

BACKENDS = ("local", "ray")


class Backend(Protocol):
    """Runs distinct cells wherever it has processes, brings their runs into the store, and yields their results."""

    def __call__(
        self, cells: Sequence[Cell], store: Path, workers: int | None, threads: int
    ) -> Generator[Result, None, None]: ...


def run_cells(
    cells: Iterable[Cell],
    store: str | Path,
    *,
    workers: int | None = None,
    threads: int = 1,
    progress: Progress = SILENT,
    keep_going: bool = True,
    backend: Backend = run_local,
    retry_failed: bool = True,
    told: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run the cells that are not done yet; called again after a kill, it goes on.

    Cells run in processes of their own even with one worker, so that a result depends neither on the number of workers
    nor on what this process did before. A cell is done when `store/<key>` exists; it is named by function and arguments
    alone, so that changed code needs another store. Thread count, versions and machine stand in its provenance.

    Args:
        cells: What to do; equal cells are done once.
        store: Directory of the cells' runs, made if it is missing.
        workers: Processes at a time; None for the number of processors over `threads`. Cells that share an accelerator
            need a number that fits it.
        threads: Torch threads of each process, at least 1.
        progress: Told of each cell that ends.
        keep_going: Run the others when a cell fails; else the first failure stops all and is raised.
        backend: Where cells run.
        retry_failed: Try cells again that failed in an earlier call; else they keep the failure that is written down.
            Cells whose process died are tried again in any case.
        told: Given each distinct cell's result: first of those that are found, then of each that ends.

    Returns:
        The results in the order of the cells; a failed cell carries its `error`, and a `record` in the store that holds
        the whole of it; `report` tells them all.

    Raises:
        UserError: before any work, for a function that cannot be imported or called with the arguments, or a store
            that cannot be written; without `keep_going`, for a mistake that a cell reports.
        SweepError: if a process cannot start; without `keep_going`, for any other failure.
    """
    cells, store = list(cells), Path(store).absolute()
    distinct = {cell.key: cell for cell in cells}
    for cell in distinct.values():
        cell.bind()
    with artifacts.writing(store / artifacts.RUN_FILE):
        found = {
            key: finished(cell, store) or (None if retry_failed else failed_before(cell, store))
            for key, cell in distinct.items()
        }
    results = {key: result for key, result in found.items() if result is not None}
    todo = [cell for key, cell in distinct.items() if key not in results]
    tell = told or (lambda result: None)
    for result in results.values():
        tell(result)
    n_failed = sum(result.error is not None for result in results.values())
    progress.start("cells", len(distinct), len(results))
    with contextlib.closing(backend(todo, store, workers, threads)) as arriving:
        for arrived in arriving:
            result = written_down(arrived, store)
            results[result.cell.key] = result
            tell(result)
            n_failed += result.error is not None
            progress.advance(note=f"{n_failed} failed" if n_failed else "")
            if result.error is not None and not keep_going:
                if result.error.kind == "mistake":
                    raise UserError(f"cell {result.told}")
                raise SweepError(report([result]))
    progress.finish()
    return [results[cell.key] for cell in cells]


def backend_from(name: str, address: str | None = None, *, accelerators: float | None = None) -> Backend:
    """The backend that options name.

    Args:
        name: "local" for processes of this machine, "ray" for a cluster.
        address: Of the cluster, as `ray_backend` takes it.
        accelerators: How much of an accelerator each cell gets, as `local_backend` and `ray_backend` take it.

    Raises:
        UserError: for an unknown name, options that the backend does not take, or what the backend refuses.
    """
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    if name == "ray":
        return ray_backend(address, accelerators=accelerators)
    if address is not None:
        raise UserError("--address is of the backend 'ray'; give --backend ray, or leave --address out")
    return run_local if accelerators is None else local_backend(accelerators=accelerators)
