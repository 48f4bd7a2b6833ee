"""Cells in processes of this machine; a process that dies takes no other cell with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

from unsharp import runtime
from unsharp.errors import UserError
from unsharp.sweep.cells import Cell, Failure, Result, SweepError, run_cell

if TYPE_CHECKING:
    from unsharp.sweep import Backend

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0
STARTS = 3
"""Processes in a row that may be killed before they take a cell."""
SPAWN = multiprocessing.get_context("spawn")


def local_backend(*, accelerators: float | None = None) -> Backend:
    """A backend of `run_cells` that runs cells in processes of this machine, each with its share of the accelerators.

    Args:
        accelerators: How much of an accelerator each process gets: 0.25 a quarter (four processes share one), 2 two, 0
            none, so that they work on the processor alone. None for one where this machine has any, else none.

    Returns:
        The backend. A process sees only the accelerators that are its own. With `workers` of None there are as many
        processes as accelerators (or, without any, processors) carry; more are refused.

    Raises:
        UserError: if `accelerators` is neither a share nor a whole number, or more than this machine has.
    """
    share, there = _share(accelerators), runtime.accelerators()
    places = _places(share, there)

    def run(
        cells: Sequence[Cell], store: Path, workers: int | None = None, threads: int = 1
    ) -> Generator[Result, None, None]:
        _check(workers, threads)
        if share > 0 and workers is not None and workers > len(places):
            raise UserError(
                f"workers must be at most {len(places)}, as many as have {share:g} of {there} accelerators, got "
                f"{workers}; lower accelerators, or leave workers out"
            )
        return _run(deque(cells), store, min(len(cells), workers or carried(threads, accelerators)), threads, places)

    return run


def carried(threads: int, accelerators: float | None = None) -> int:
    """How many processes this machine carries, each with so many threads and such a share of the accelerators.

    Raises:
        UserError: as `local_backend`, or if `threads` is below 1.
    """
    _check(None, threads)
    share = _share(accelerators)
    return len(_places(share, runtime.accelerators())) if share > 0 else max(1, runtime.processors() // threads)


def _share(accelerators: float | None) -> float:
    """How much of an accelerator each process gets. Raises: UserError for none, or more than there is."""
    if accelerators is not None and not (0 <= accelerators <= 1 or (accelerators > 1 and accelerators % 1 == 0)):
        raise UserError(f"accelerators must be a share in [0, 1] or a whole number, got {accelerators}")
    there = runtime.accelerators()
    share = float(there > 0) if accelerators is None else accelerators
    if share > there:
        raise UserError(f"accelerators: each cell is to get {share:g}, but this machine has {there}; lower it")
    return share


def _places(share: float, there: int) -> list[dict[str, str]]:
    """What each process that has a share of the accelerators is told of them; for a share of 0 one for all."""
    if share == 0:
        return [dict.fromkeys(runtime.seeing(0), "")]
    if share > 1:
        return [runtime.seeing(first, int(share)) for first in range(0, there - int(share) + 1, int(share))]
    return [runtime.seeing(i) for _ in range(int(1 / share + 1e-9)) for i in range(there)]


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
    _check(workers, threads)
    n_workers = min(len(cells), workers or carried(threads, 0))
    return _run(deque(cells), store, n_workers, threads)


def _check(workers: int | None, threads: int) -> None:
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")


def _run(
    pending: deque[Cell], store: Path, n_workers: int, threads: int, places: Sequence[Mapping[str, str]] = ({},)
) -> Generator[Result, None, None]:
    """Args: places: Variables of the processes, in turn; a process that is replaced leaves its own to the next."""
    team: list[_Worker] = []
    false_starts = 0
    try:
        while len(team) < n_workers:
            team.append(_Worker(store, threads, places[len(team) % len(places)]))
        while team:
            connection.wait([worker.pipe for worker in team], POLL_SECONDS)
            for worker in [worker for worker in team if worker.has_news()]:
                result = worker.hear()
                false_starts = false_starts + 1 if worker.false_start else 0
                if false_starts == STARTS:
                    raise SweepError(
                        f"{STARTS} processes in a row ended before they took a cell; the last {worker.end}"
                    )
                if pending and worker.alive:
                    worker.give(pending.popleft())
                else:
                    team.remove(worker)
                    worker.dismiss()
                    if pending:
                        team.append(_Worker(store, threads, worker.place))
                if result is not None:
                    yield result
    finally:
        for worker in team:
            worker.process.terminate()
        for worker in team:
            worker.dismiss()


class _Worker:
    """A process that does one cell after the other, seen from the sweep."""

    def __init__(self, store: Path, threads: int, place: Mapping[str, str]) -> None:
        self.place = place
        self.pipe, end = SPAWN.Pipe()
        # Not a daemon: a cell may have processes of its own, such as those that load data.
        self.process = SPAWN.Process(target=_serve, args=(end, store, threads), name="unsharp cell")
        self.cell: Cell | None = None
        self.alive, self.false_start, self.end = True, False, ""
        try:
            with _birth({"OMP_NUM_THREADS": str(threads), **place}):
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
        """The result of its cell, or None if it has just started or was killed at it.

        Raises:
            SweepError: if it could not start, and another one could not either.
        """
        cell, self.cell = self.cell, None
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, OSError):
            pass
        self.alive = False
        self.process.join()
        self.end = self._end()
        if cell is None and (self.process.exitcode or 0) < 0:
            self.false_start = True
            return None
        if cell is None:
            raise SweepError(
                f"a process of the sweep {self.end} before it took a cell; a script must start its sweep under "
                "`if __name__ == '__main__':`, other reasons stand in the output above"
            )
        return Result(cell, error=Failure("died", f"its process {self.end}"))

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
def _birth(variables: Mapping[str, str]) -> Iterator[None]:
    """What a process inherits at its start: variables for libraries not yet loaded, and no ear for Ctrl-C.

    An interrupt goes to the whole process group; the sweep alone answers it, and ends its processes.
    """
    resource_tracker.ensure_running()  # the first start would do this, and unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
