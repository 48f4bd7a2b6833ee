"""What runs on the machines of a cluster: a process that does one cell after the other."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import unsharp
from unsharp import artifacts, runtime
from unsharp.errors import UserError
from unsharp.sweep.cells import Cell, Failure, run_cell
from unsharp.sweep.parcel import pack

ORPHAN_SECONDS = 30.0
"""How long what a dead process has left behind may hold the directory of its cell."""


@dataclass(frozen=True)
class Order:
    """What each process of a sweep is told when it starts.

    Args:
        store: The directory of the sweep's runs on the machine where the sweep was started.
        token: Name and content of a file in it.
        identity: Names the store wherever it is.
        threads: Torch threads.
        paths: Where the sweep's own process finds modules.
        shared: Whether the process writes into the store; None if it shall look for the token.
    """

    store: str
    token: str
    identity: str
    threads: int
    paths: Sequence[str] = ()
    shared: bool | None = None


@dataclass(frozen=True)
class About:
    """What a process says of itself.

    Args:
        machine: Name of its machine.
        versions: Versions of what results depend on.
        code: sha256 (hex) of this library's files.
        refused: Why it can do no cell; "" if it can.
    """

    machine: str
    versions: Mapping[str, str]
    code: str
    refused: str = ""


@dataclass(frozen=True)
class Answer:
    """What became of a cell on another machine.

    Args:
        error: Why it failed, or None.
        value: What its function returned.
        seconds: How long it took.
        reused: True if it was found done.
        parcel: The run directory as `pack` writes it, or None if it is in the store.
    """

    error: Failure | None = None
    value: Any = None
    seconds: float = 0.0
    reused: bool = False
    parcel: bytes | None = None


class Worker:
    """A process of a sweep, on whatever machine."""

    def __init__(self, order: Order) -> None:
        self.order = order
        # At the end: what this machine has of its own goes first.
        sys.path += [path for path in order.paths if path not in sys.path and os.path.isdir(path)]
        self.refused = ""
        self.shared = _sees(order) if order.shared is None else order.shared
        self.store = Path(order.store)
        if not self.shared:
            try:
                self.store = _own_directory() / order.identity
                self.store.mkdir(exist_ok=True)
            except (OSError, UserError) as error:
                self.refused = str(error)

    def about(self) -> About:
        """Say where this process is, and what it would work with."""
        return About(platform.node(), versions(), code(), self.refused)

    def do(self, function: str, arguments: Mapping[str, Any], again: bool) -> Answer:
        """Do a cell, and bring it back if the store is not seen from here.

        Args:
            function: Of the cell.
            arguments: Of the cell.
            again: True if a process died over it: what that one has left may still hold its directory.
        """
        cell = Cell(function, arguments)
        runtime.set_threads(self.order.threads)  # each time: the cell before may have changed it
        if again and not artifacts.wait_until_free(self.store / cell.key, ORPHAN_SECONDS):
            return Answer(Failure("died", "its process died and left others, which still hold its directory"))
        result = run_cell(cell, self.store)
        parcel = None
        if result.path is not None and not self.shared:
            try:
                parcel = pack(result.path)
            except UserError as mistake:
                return Answer(Failure("mistake", str(mistake)))
            finally:
                artifacts.remove_run(artifacts.open_run(result.path))
        return Answer(result.error, result.value, result.seconds, result.reused and not again, parcel)


def versions() -> dict[str, str]:
    """The versions that must be equal on all machines of a sweep; a build for an accelerator is as good as another."""
    found = runtime.versions(("torch", "numpy", "safetensors"))
    python = ".".join(found.pop("python").split(".")[:2])
    return {"python": python, **{name: re.split(r"[+]", text)[0] for name, text in found.items()}}


@functools.cache
def code() -> str:
    """sha256 (hex) of this library's files."""
    root = Path(unsharp.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sees(order: Order) -> bool:
    try:
        return (Path(order.store) / order.token).read_text() == order.token
    except (OSError, UnicodeDecodeError):
        return False


def _own_directory() -> Path:
    """Where runs grow on a machine without the store: in its directory for temporary files, and nobody else's."""
    path = Path(tempfile.gettempdir()) / f"unsharp-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    about = path.lstat()
    if path.is_symlink() or about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise UserError(
            f"{path} on {platform.node()} belongs to somebody else; set TMPDIR there to a directory of yours"
        )
    return path
