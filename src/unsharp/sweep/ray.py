"""Cells on the machines of a Ray cluster; a process or machine that dies is replaced, and its cell tried again."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unsharp import artifacts
from unsharp.errors import UserError, listed
from unsharp.sweep import cluster
from unsharp.sweep.cells import Cell, Failure, Result, SweepError
from unsharp.sweep.cluster import Needs, first_line
from unsharp.sweep.parcel import unpack
from unsharp.sweep.remote import About, Answer, Order, Worker, code, versions

if TYPE_CHECKING:
    from unsharp.sweep import Backend

POLL_SECONDS = 1.0
LOOK_SECONDS = 5.0
"""Between two looks at how many machines there are."""
GRACE_SECONDS = 5.0
VISIBLE_SECONDS = 60.0
"""How long a run that another machine wrote may take to show: network file systems keep what they saw."""
STARTS = 3
"""Processes in a row that may end before they take a cell."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""What Ray colours its tracebacks with."""


def ray_backend(
    address: str | None = None,
    *,
    accelerators: float | None = None,
    retries: int = 2,
    shared: bool | None = None,
    patience: float = 60.0,
    runtime_env: Mapping[str, Any] | None = None,
) -> Backend:
    """A backend of `run_cells` that runs cells on the machines of a Ray cluster.

    Args:
        address: "auto" for the cluster that this machine belongs to, "host:port", or "ray://host:port". None for the
            Ray that this process is connected to already, and where there is none for one of this machine alone: it
            lives as long as this process, has no dashboard, and takes work from nobody else.
        accelerators: How much of an accelerator is set aside for each cell: 0 none, 0.25 a quarter (four cells share
            one), 2 two. None for one where the cluster has any, else none.
        retries: How often a cell is tried again after its process or its machine died, at least 0.
        shared: True if all machines write into the store, False if each keeps its runs until they are brought back
            here; None finds out.
        patience: Seconds to wait for a machine that is large enough for a cell, at least 0.
        runtime_env: Further `runtime_env` of Ray for a connection that is made, such as {"pip": [...]} or
            {"py_modules": ["my_package"]}; this library's own code is sent along in any case.

    Returns:
        The backend. It sets `threads` processors aside for each cell, and with `workers` of None runs as many as the
        machines carry, which may change meanwhile. Beyond what `run_cells` names, it raises UserError if there is no
        cluster, none of its machines is large enough, or one has other versions or other code.

    Raises:
        UserError: if Ray is not installed, an argument is out of range, or nothing answers at the address.
    """
    if accelerators is not None and not (0 <= accelerators <= 1 or (accelerators > 1 and accelerators % 1 == 0)):
        raise UserError(f"accelerators must be a share in [0, 1] or a whole number, got {accelerators}")
    for name, value in (("retries", retries), ("patience", patience)):
        if not value >= 0:
            raise UserError(f"{name} must be at least 0, got {value}")
    cluster.load()
    cluster.check(address)
    environment = dict(runtime_env or {})

    def run_ray(
        cells: Sequence[Cell], store: Path, workers: int | None = None, threads: int = 1
    ) -> Generator[Result, None, None]:
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if not cells:
            return _nothing()
        at_least = threads * min(len(cells), workers or 1)
        started = cluster.connect(address, at_least, environment)
        share = accelerators if accelerators is not None else float(cluster.has_accelerators())
        needs = Needs(threads, share)
        cluster.wait_for_machine(needs, 0 if started else patience)
        sees = True if started and shared is None else shared
        return _Sweep(cells, store, workers, needs, retries, sees, None if started else code()).run()

    return run_ray


@dataclass
class _Member:
    """A process on some machine, seen from the sweep. It owes an answer: on its cell, or at first on itself."""

    actor: Any
    owes: Any
    cell: Cell | None = None
    machine: str = "some machine"


class _Sweep:
    """The cells that are still to be done, and the processes that do them."""

    def __init__(
        self,
        cells: Sequence[Cell],
        store: Path,
        workers: int | None,
        needs: Needs,
        retries: int,
        shared: bool | None,
        code: str | None,
    ) -> None:
        self.todo = deque(cells)
        self.store = store
        self.workers = workers
        self.needs = needs
        self.retries = retries
        self.shared = shared
        self.code = code
        self.team: list[_Member] = []
        self.deaths: Counter[str] = Counter()
        self.false_starts = 0
        self._carried, self._looked = 0, -LOOK_SECONDS

    def run(self) -> Generator[Result, None, None]:
        ray = cluster.load()
        with _token(self.store) as token:
            paths = [os.path.abspath(path) for path in sys.path]
            order = Order(str(self.store), token, _identity(self.store), self.needs.processors, paths, self.shared)
            try:
                while self.todo or any(member.cell for member in self.team):
                    if not ray.is_initialized():  # else the next call would start another Ray
                        raise ConnectionError("somebody has closed the connection")
                    self._fill(order)
                    owed = {member.owes: member for member in self.team}
                    for ref in ray.wait(list(owed), timeout=POLL_SECONDS)[0]:
                        result = self._hear(owed[ref])
                        if result is not None:
                            yield result
            except (ray.exceptions.RaySystemError, ConnectionError) as error:
                raise SweepError(
                    f"the Ray cluster is lost ({first_line(error)}); call again, the sweep goes on"
                ) from error
            finally:
                _stop(self.team)

    def _fill(self, order: Order) -> None:
        """As many processes as there is room and work for."""
        starting = [member for member in self.team if member.cell is None]
        for _ in range(min(len(self.todo) - len(starting), self._room() - len(self.team))):
            self.team.append(_hire(order, self.needs))
        if not self.todo:  # those that start may wait for a place for hours
            self._let_go(starting)

    def _room(self) -> int:
        if self.workers is not None:
            return self.workers
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._carried, self._looked = cluster.carried(self.needs), time.monotonic()
        return max(1, self._carried)

    def _hear(self, member: _Member) -> Result | None:
        """Take what a member owes, and say what is next for it; the result of its cell, if that is what it was."""
        exceptions = cluster.load().exceptions
        cell, member.cell = member.cell, None
        try:
            answer = cluster.load().get(member.owes)
        except exceptions.RayTaskError as error:  # no failure of the cell, which would have been an answer
            trace = COLOURS.sub("", str(error)).strip()
            answer = Answer(Failure("failed", trace.splitlines()[-1], trace))
        except exceptions.RayError as error:
            return self._died(member, cell, error)
        if cell is None:
            self._admit(member, answer)
        if self.todo:
            self._give(member)
        else:
            self._let_go([member])
        return None if cell is None else self._result(cell, answer, member.machine)

    def _give(self, member: _Member) -> None:
        member.cell = cell = self.todo.popleft()
        again = self.deaths[cell.key] > 0
        member.owes = member.actor.do.remote(cell.function, dict(cell.arguments), again)

    def _died(self, member: _Member, cell: Cell | None, error: Exception) -> Result | None:
        why = _why(error, member.machine)
        self._let_go([member])
        if cell is None:
            self.false_starts += 1
            if self.false_starts == STARTS:
                raise SweepError(f"{STARTS} processes in a row ended before they took a cell; the last: {why}")
            return None
        self.deaths[cell.key] += 1
        if self.deaths[cell.key] <= self.retries:
            self.todo.append(cell)
            return None
        tries = f" (tried {self.retries + 1} times)" if self.retries else ""
        return Result(cell, error=Failure("died", f"{why}{tries}"))

    def _admit(self, member: _Member, answer: About | Answer) -> None:
        """Raises: UserError for a machine whose results would not be comparable. SweepError if it cannot work."""
        if isinstance(answer, Answer):
            raise SweepError(f"a process cannot start on the cluster: {answer.error and answer.error.message}")
        if answer.refused:
            raise UserError(f"machine {answer.machine} cannot take part: {answer.refused}")
        here, there = versions(), answer.versions
        differ = [f"{name} {there.get(name)} (here {here[name]})" for name in here if there.get(name) != here[name]]
        if differ:
            raise UserError(f"machine {answer.machine} has {listed(differ)}; install the same versions on all machines")
        if self.code is not None and answer.code != self.code:
            raise UserError(
                f"machine {answer.machine} has other code of unsharp than this one; install the same on all machines, "
                "or give the address of the cluster, and the code is sent along"
            )
        self.false_starts, member.machine = 0, answer.machine

    def _result(self, cell: Cell, answer: Answer, machine: str) -> Result:
        path, error, parcel = self.store / cell.key, answer.error, answer.parcel
        if error is None and parcel is not None:
            try:
                artifacts.adopt(path, lambda directory: unpack(parcel, directory))
            except UserError as mistake:
                error = Failure("mistake", str(mistake))
        elif error is None and not _visible(path):
            error = Failure("failed", f"done, says {machine}, but it does not show here at {path}")
        if error is not None:
            return Result(cell, error=error, seconds=answer.seconds)
        return Result(cell, path, answer.value, seconds=answer.seconds, reused=answer.reused)

    def _let_go(self, members: Sequence[_Member]) -> None:
        for member in members:
            self.team.remove(member)
            _kill(member)


def _hire(order: Order, needs: Needs) -> _Member:
    """Ask the cluster for a process; it says something of itself as soon as it has a place."""
    remote = cluster.load().remote(Worker)
    actor = remote.options(
        num_cpus=needs.processors,
        num_gpus=needs.accelerators,
        max_restarts=0,
        max_task_retries=0,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(order.threads)}},  # for libraries that are not loaded yet
    ).remote(order)
    return _Member(actor, actor.about.remote())


def _kill(member: _Member) -> None:
    ray = cluster.load()
    with contextlib.suppress(Exception):  # the cluster may be gone, and the process with it
        if ray.is_initialized():  # else the call would start another Ray
            ray.kill(member.actor)


def _stop(team: Sequence[_Member]) -> None:
    """End processes in the middle of their work, and wait a while until they are gone."""
    for member in team:
        _kill(member)
    ray = cluster.load()
    if team and ray.is_initialized():
        with contextlib.suppress(Exception):
            ray.wait([member.owes for member in team], num_returns=len(team), timeout=GRACE_SECONDS)


def _why(error: Exception, machine: str) -> str:
    """What ended a process, in a line."""
    exceptions, text = cluster.load().exceptions, str(error)
    if isinstance(error, exceptions.OutOfMemoryError):
        return f"Ray ended its process, because the memory of {machine} was full"
    if "creation task" in text or isinstance(error, exceptions.RuntimeEnvSetupError):
        return text.strip().splitlines()[-1].strip()
    if "node has died" in text:
        return f"machine {machine} is gone"
    return f"its process on {machine} was killed or left (out of memory?)"


def _nothing() -> Generator[Result, None, None]:
    yield from ()


@contextlib.contextmanager
def _token(store: Path) -> Iterator[str]:
    """A file that only this sweep knows of: who reads it sees this very store, and no copy of it."""
    path = store / f".sweep-{secrets.token_hex(16)}"
    with artifacts.writing(path):
        path.write_text(path.name)
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def _identity(store: Path) -> str:
    """A name that the store keeps, so that what was begun elsewhere goes on there, but not for a store made anew."""
    path = store / ".identity"
    if not path.exists():
        artifacts.write_text(path, secrets.token_hex(16))
    return path.read_text()


def _visible(path: Path) -> bool:
    end = time.monotonic() + VISIBLE_SECONDS
    while not (path / artifacts.RUN_FILE).is_file():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
        os.listdir(path.parent)  # makes a network file system look again
    return True
