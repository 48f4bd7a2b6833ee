"""Calls of the command line: in this process, which is quick, or in one of its own that may be killed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import unsharp
from unsharp import cli

SOURCE = str(Path(unsharp.__file__).parents[1])
PRELOADED = ["torch._dynamo", "unsharp.stages", "unsharp.cli", "unsharp.report.html", "sklearn.datasets", "sklearn.svm"]
"""What takes long to import; torch's optimisers load the first of these when they are first made."""
QUICK = ("--batch-size", "64", "--threads", "1")
MAY_DIFFER = ("seconds", "peak_memory_bytes")
"""Figures of a run that are not a function of its configuration."""


@dataclass(frozen=True)
class Answer:
    """What a call returned and printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on standard output; anything else there is an error."""
        return json.loads(self.out)


def call(*arguments: object) -> Answer:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli._guarded([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Answer:
    """Run a command that must succeed."""
    answer = call(*arguments)
    assert answer.code == 0, answer.err
    return answer


def python(*arguments: object, **variables: str) -> Answer:
    """Run the interpreter in a process of its own, with this library."""
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *(str(a) for a in arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return Answer(ended.returncode, ended.stdout, ended.stderr)


class Process:
    """A command in a process of its own, forked from a clean server that has already imported what it needs."""

    def __init__(self, directory: Path, *arguments: object) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._files = [directory / f".{kind}-{time.monotonic_ns()}" for kind in ("out", "err")]
        # What a server process runs must not depend on the test module that started it.
        self._process = context.Process(
            target=_main, args=(str(directory), [str(f) for f in self._files], [str(a) for a in arguments])
        )
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it still runs."""
        if self._process.is_alive() and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def end(self, seconds: float = 120) -> Answer:
        """Wait for the end; a code below 0 is the signal that ended it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "the process does not end"
        out, err = (f.read_text() if f.exists() else "" for f in self._files)
        for file in self._files:
            file.unlink(missing_ok=True)
        return Answer(self._process.exitcode, out, err)


def _main(directory: str, files: list[str], arguments: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.chdir(directory)
    for descriptor, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main(arguments)


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Wait until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def alive(pid: int) -> bool:
    """Whether a process runs, whoever started it; one that has ended but is not yet taken note of does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> dict[int, str]:
    """The processes below a process, each with its command line."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found: dict[int, str] = {}
    below = [pid]
    while below:
        below = [child for child, parent in parents.items() if parent in below]
        for child in below:
            with contextlib.suppress(OSError):
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def tree(directory: Path) -> dict[str, str]:
    """Every path below, hidden ones too, with the content's sha256."""
    return {
        str(path.relative_to(directory)): "directory" if path.is_dir() else sha256(path)
        for path in sorted(directory.rglob("*"))
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steady(values: Any) -> Any:
    """The same values without what differs from one run to the next."""
    if isinstance(values, dict):
        return {k: steady(v) for k, v in values.items() if k not in MAY_DIFFER}
    return [steady(v) for v in values] if isinstance(values, list) else values


def read(path: Path) -> Any:
    return json.loads(path.read_text())
