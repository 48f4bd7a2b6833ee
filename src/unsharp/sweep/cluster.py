"""The Ray cluster that this process is connected to, or the Ray of this machine that it started."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import unsharp
from unsharp import runtime
from unsharp.errors import UserError
from unsharp.sweep.cells import SweepError

ADDRESS = re.compile(r"(ray://)?(?P<host>[^/\s:\[\]]+|\[[0-9a-fA-F:.]+\]):(?P<port>\d{1,5})")
ANSWER_SECONDS = 5.0
POLL_SECONDS = 1.0
OBJECT_STORE_BYTES = 80 * 2**20
"""Shared memory of a Ray of this machine, where results go through files: the least that Ray takes."""
SHORT_PATH = 30
"""Characters of a directory in which the names of Ray's sockets are not too long for the system."""
SPARING = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
"""Ray's switches against processes that start before anybody asks for them, and without what ours need."""
SILENT = {"RAY_USAGE_STATS_ENABLED": "0"}
"""Ray's switch against the statistics that it would send to its makers."""
SET_BY_RAY = ("RAY_AUTH_MODE", "PYTHONBREAKPOINT")
"""Variables of this process that Ray changes without being asked."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What is set aside for one process.

    Args:
        processors: At least 1.
        accelerators: A share in [0, 1], or a whole number.
    """

    processors: int
    accelerators: float

    def __str__(self) -> str:
        return _amounts(self.processors, self.accelerators)


@dataclasses.dataclass(frozen=True)
class _Connection:
    """How this process came to its Ray: by an address, or by starting it in a directory."""

    address: str | None = None
    directory: Path | None = None


_connection: _Connection | None = None


def load() -> Any:
    """The module `ray`. Raises: UserError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UserError(f"Ray cannot be imported ({error}); pip install 'unsharp[scale]'") from None
    return ray


def check(address: str | None) -> None:
    """Raises: UserError if the address is none, or nothing answers there; Ray itself would try for minutes."""
    named = (os.environ.get("RAY_ADDRESS") or _noted()) if address == "auto" else address
    if named is None:  # where "auto" is not noted, Ray looks for its processes and says at once that there are none
        return
    found = ADDRESS.fullmatch(named)
    if found is None or not 0 < int(found["port"]) < 2**16:
        raise UserError(f"address must be 'auto', 'host:port' or 'ray://host:port', got {named!r}")
    try:
        socket.create_connection((found["host"].strip("[]"), int(found["port"])), ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {named!r} ({error}); start one with `ray start --head`, or leave the address "
            "out for a Ray of this machine"
        ) from None


def connect(address: str | None, processors: int, runtime_env: Mapping[str, Any]) -> bool:
    """Be connected to a cluster: to one at the address, the one that there is already, or one that is started here.

    Args:
        address: As `check` takes it, or None.
        processors: At least so many are given to a Ray that is started here, whatever this machine has.
        runtime_env: Of Ray, for a connection that is made.

    Returns:
        True if it was started by this process.

    Raises:
        UserError: if there is no cluster at the address, or this process is connected to another one.
        SweepError: if Ray does not start here.
    """
    global _connection
    if load().is_initialized():
        known = None if _connection is None else _connection.address
        if address not in (None, known):
            raise UserError(
                f"this process is connected to a Ray already{f', at {known!r}' if known else ''}, and cannot change to "
                f"{address!r}; leave the address out, or start another process"
            )
        return _connection is not None and known is None
    _connection = _started(processors, runtime_env) if address is None else _joined(address, runtime_env)
    return address is None


def carried(needs: Needs) -> int:
    """How many processes with such needs the machines of the cluster carry, whoever else uses them."""
    share, total = needs.accelerators, 0
    for processors, accelerators in _machines():
        fits = int(processors // needs.processors)
        if share > 0:
            fits = min(fits, int(accelerators) * int(1 / share + 1e-9) if share <= 1 else int(accelerators // share))
        total += fits
    return total


def has_accelerators() -> bool:
    """Whether any machine of the cluster has one."""
    return any(accelerators for _, accelerators in _machines())


def wait_for_machine(needs: Needs, patience: float) -> None:
    """Raises: UserError if after so many seconds no machine is large enough for a process."""
    end = time.monotonic() + patience
    while not carried(needs):
        if time.monotonic() >= end:
            has = "; ".join(_amounts(*machine) for machine in _machines())
            raise UserError(
                f"no machine of the cluster has {needs}, which a cell is to get (they have: {has}); lower threads or "
                "accelerators, or add a machine"
            )
        time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))


def first_line(error: BaseException) -> str:
    """What Ray says of an error, without the advice below."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _joined(address: str, runtime_env: Mapping[str, Any]) -> _Connection:
    check(address)
    code = [str(_package()), *runtime_env.get("py_modules", ())]
    with _aside(SILENT):
        try:
            _init(address, runtime_env={**runtime_env, "py_modules": code})
        except (Exception, SystemExit) as error:
            raise UserError(f"the Ray cluster at {address!r} cannot be used: {first_line(error)}") from None
    return _Connection(address)


def _started(processors: int, runtime_env: Mapping[str, Any]) -> _Connection:
    place = tempfile.gettempdir()
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir=place if len(place) <= SHORT_PATH else "/tmp"))
    atexit.register(_leave, directory)
    path = os.pathsep.join(filter(None, [str(_package().parent), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": path, **runtime_env.get("env_vars", {})}
    with _aside({**SILENT, **SPARING, **_secret()}):
        try:
            _init(
                "local",
                num_cpus=max(processors, runtime.processors()),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                runtime_env={**runtime_env, "env_vars": variables},
                _temp_dir=str(directory),
            )
        except (Exception, SystemExit) as error:
            raise SweepError(f"Ray does not start on this machine: {first_line(error)}") from error
    return _Connection(directory=directory)


def _init(address: str, **options: Any) -> None:
    ray = load()
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    ray.init(address, log_to_driver=False, configure_logging=False, **options)
    # Or it would print of each process that dies, on standard output.
    ray._private.worker._worker_logs_enabled = False


def _leave(directory: Path) -> None:
    """End the Ray that was started here, and take away its sockets and logs."""
    if _connection is not None and _connection.directory == directory:
        load().shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _aside(environment: Mapping[str, str]) -> Iterator[None]:
    """Variables for processes that start in the block; afterwards they, and the answer to SIGTERM, are as before."""
    before = {name: os.environ.get(name) for name in (*environment, *SET_BY_RAY)}
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main else None
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _noted() -> str | None:
    """The address that `ray start` has noted on this machine; the cluster may be gone since."""
    place = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    try:
        return (place / "ray" / "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def _machines() -> list[tuple[float, float]]:
    """Processors and accelerators of each living machine."""
    living = [node["Resources"] for node in load().nodes() if node["Alive"]]
    return [(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in living]


def _amounts(processors: float, accelerators: float) -> str:
    found = {"processor": processors, "accelerator": accelerators}
    return " and ".join(f"{n:g} {what}{'' if n == 1 else 's'}" for what, n in found.items() if n) or "none"


def _secret() -> dict[str, str]:
    """The token that keeps others from giving work to a Ray whose ports are open to the network.

    Ray demands one by itself, and writes it into the user's home if it finds none.
    """
    known = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if known or (Path.home() / ".ray" / "auth_token").exists():
        return {}
    return {"RAY_AUTH_TOKEN": _own_token()}


@functools.cache
def _own_token() -> str:
    return secrets.token_hex(32)  # one for each process, since Ray keeps what it has read first


def _package() -> Path:
    return Path(unsharp.__file__).parent
