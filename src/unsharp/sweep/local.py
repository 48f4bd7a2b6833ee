"""Cells in processes of this machine; a process that dies takes no other cell with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from pathlib import Path

from unsharp import runtime
from unsharp.errors import UserError
from unsharp.sweep.cells import Cell, Failure, Result, SweepError, run_cell

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
SPAWN = multiprocessing.get_context("spawn")


def run_local(
    cells: Sequence[Cell], store: Path, workers: int | None = None, threads: int = 1
) -> Generator[Result, None, None]:
    """Run the cells in local processes; the backend that `run_cells` takes by default.

    Args:
        cells: Distinct cells.
        store: Directory of their runs.
        workers: Processes at a time; None for as many as the processors carry with `threads` each.
        threads: Torch threads of each process.

    Returns:
        An iterator over the results, as they come; closing it stops the processes.

    Raises:
        UserError: if `workers` or `threads` is below 1.
        SweepError: if a process cannot start.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    n_workers = min(len(cells), workers or max(1, runtime.processors() // threads))
    return _run(deque(cells), store, n_workers, threads)


def _run(pending: deque[Cell], store: Path, n_workers: int, threads: int) -> Generator[Result, None, None]:
    team: list[_Worker] = []
    try:
        while len(team) < n_workers:
            team.append(_Worker(store, threads))
        while team:
            connection.wait([worker.pipe for worker in team], POLL_SECONDS)
            for worker in [worker for worker in team if worker.has_news()]:
                result = worker.hear()
                if pending and worker.alive:
                    worker.give(pending.popleft())
                else:
                    team.remove(worker)
                    worker.dismiss()
                    if pending:
                        team.append(_Worker(store, threads))
                if result is not None:
                    yield result
    finally:
        for worker in team:
            worker.process.terminate()
        for worker in team:
            worker.dismiss()


class _Worker:
    """A process that does one cell after the other, seen from the sweep."""

    def __init__(self, store: Path, threads: int) -> None:
        self.pipe, end = SPAWN.Pipe()
        # Not a daemon: a cell may have processes of its own, such as those that load data.
        self.process = SPAWN.Process(target=_serve, args=(end, store, threads), name="unsharp cell")
        self.cell: Cell | None = None
        self.alive = True
        try:
            with _birth(threads):
                self.process.start()
        except BaseException:  # an interrupt that waited until the process was there: it ends with its pipe
            self.pipe.close()
            raise
        end.close()

    def has_news(self) -> bool:
        # Children of a dead process may still hold its end of the pipe, hence the second question.
        return self.pipe.poll() or not self.process.is_alive()

    def give(self, cell: Cell) -> None:
        self.cell = cell
        with contextlib.suppress(OSError):  # it has just died: the next news
            self.pipe.send(cell)

    def hear(self) -> Result | None:
        """The result of its cell, or None if it has just started. Raises: SweepError if it could not start."""
        cell, self.cell = self.cell, None
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, OSError):
            pass
        self.alive = False
        self.process.join()
        if cell is None:
            raise SweepError(
                f"a process of the sweep {self._end()} before it took a cell; a script must start its sweep under "
                "`if __name__ == '__main__':`, other reasons stand in the output above"
            )
        return Result(cell, error=Failure("died", f"its process {self._end()}"))

    def dismiss(self) -> None:
        """Let an idle process go, and wait until it is gone."""
        self.pipe.close()
        self.process.join(GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()

    def _end(self) -> str:
        code = self.process.exitcode or 0
        if code >= 0:
            return f"left with exit code {code}"
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"


def _serve(pipe: connection.Connection, store: Path, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # dismissed
        pipe.send(None)
        while True:
            cell = pipe.recv()
            runtime.set_threads(threads)  # each time: the cell before may have changed it
            pipe.send(run_cell(cell, store))


def _end_with_parent() -> None:
    """End this process when the sweep's is gone, even killed: nobody is left behind at work, holding its lock."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _birth(threads: int) -> Iterator[None]:
    """What a process inherits at its start: thread counts for libraries not yet loaded, and no ear for Ctrl-C.

    An interrupt goes to the whole process group; the sweep alone answers it, and ends its processes.
    """
    resource_tracker.ensure_running()  # the first start would do this, and unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({} if before is None else {"OMP_NUM_THREADS": before})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
