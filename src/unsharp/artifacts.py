"""Run directories: written whole or not at all, found again by content, resumed after a kill."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from unsharp import config, seal
from unsharp.errors import UserError, listed
from unsharp.seal import RUN_FILE

if TYPE_CHECKING:
    import torch

RESUME_FILE = "resume.pt"
LOCK_FILE = ".lock"
SETTINGS_FILE = "settings.json"
LOCK_SECONDS = 0.1
"""Between two looks at a lock that another process holds."""


@dataclass(frozen=True)
class Run:
    """A finished run directory.

    Args:
        path: The directory.
        stage: What made it ("train", "unlearn", ...).
        config: The whole configuration of the work, as plain values.
        provenance: Versions, machine, time: what the result may depend on beyond the configuration.
        reused: True if the work was found done.
    """

    path: Path
    stage: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    reused: bool = False

    def file(self, name: str) -> Path:
        """The path of one of the run's files."""
        return self.path / name

    def json(self, name: str) -> Any:
        """The content of one of the run's JSON files."""
        return config.read_json(self.path / name)


def open_run(path: str | Path, stage: str | None = None) -> Run:
    """The finished run at `path`. Raises: UserError if there is none, or it is of another stage."""
    path = Path(path)
    if not (path / RUN_FILE).is_file():
        raise UserError(f"{path} is not a finished run (no {RUN_FILE}); give the directory that a command wrote")
    values = config.read_json(path / RUN_FILE)
    if stage is not None and values.get("stage") != stage:
        raise UserError(f"{path} is a run of {values.get('stage')!r}; one of {stage!r} is needed")
    return Run(path, values["stage"], values["config"], values["provenance"])


def remove_run(run: Run) -> None:
    """Delete a run directory; whenever a kill comes, it is whole or it is gone."""
    gone = run.path.parent / f".{run.path.name}.gone"
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(run.path, gone)
    shutil.rmtree(gone)


class Workspace:
    """The place where a run grows before it gets its name; nothing in it is visible as a result."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> Path:
        """Where a result file of that name is to be written."""
        return self.path / name

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file, whole."""
        write_json(self.path / name, values)

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Keep the state from which a killed run goes on."""
        import torch  # not above: who only reads runs need not wait for it

        # Through a file of ours, a full disk stays an OSError.
        with atomic(self.path / RESUME_FILE) as temporary, open(temporary, "wb") as file:
            torch.save(dict(state), file)

    def load_state(self, device: torch.device) -> dict[str, Any] | None:
        """The state that was kept last, or None."""
        import torch

        path = self.path / RESUME_FILE
        return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def perform(
    path: str | Path,
    stage: str,
    settings: dict[str, Any],
    work: Callable[[Workspace], None],
    *,
    provenance: Mapping[str, Any] | None = None,
    force: bool = False,
    wait: bool = False,
) -> Run:
    """Do `work` into the run directory `path`, or find it done.

    The work fills a hidden directory beside `path`, which is renamed when everything in it is written. After a kill the
    next call with the same settings finds the hidden directory and goes on.

    Args:
        path: The run directory.
        stage: What the work is ("train").
        settings: The whole configuration of the work, as plain values; identical settings are identical work.
        work: Fills the workspace.
        provenance: What else to record.
        force: Do it again, and replace what is there once the new run is whole.
        wait: Wait for another process that is at work on it, and take its result.

    Raises:
        UserError: if `path` holds other work, is in use by another process, or cannot be written.
    """
    path = Path(path)
    settings = config.to_dict(settings)
    _recover(path)
    found = _same_run(path, stage, settings, force)
    if found is not None:
        return found
    partial = _partial(path)
    with writing(path), _locked(partial, wait):
        found = _same_run(path, stage, settings, force)  # another process may have done it meanwhile
        if found is not None:
            shutil.rmtree(partial, ignore_errors=True)
            return found
        if not _continues(partial, settings, force):
            _remove(entry for entry in partial.iterdir() if entry.name != LOCK_FILE)
            write_json(partial / SETTINGS_FILE, settings)
        with _leaving_nothing_of_mistakes(partial):
            work(Workspace(partial))
        values = {
            "stage": stage,
            "config": settings,
            "hash": config.digest(settings),
            "provenance": _circumstances(provenance),
        }
        # What is hidden is the lock, or was left by a kill in the middle of a write.
        passing = [e for e in partial.iterdir() if e.name in (RESUME_FILE, SETTINGS_FILE) or e.name.startswith(".")]
        files = seal.contents(partial, [RUN_FILE, *(entry.name for entry in passing)])
        write_text(partial / RUN_FILE, seal.sealed(config.to_dict(values), files))
        _remove(passing)
        _swap(partial, path)
    return Run(path, stage, settings, values["provenance"])


def amend(path: str | Path, fill: Callable[[Path], None]) -> Run:
    """Change files of a finished run, and seal it anew; whenever a kill comes, it is as before or as after.

    Args:
        path: The run directory.
        fill: Writes the files that change into a directory that holds all of the run; each must be written whole, as
            `write_json` does, since they are the same files until then.

    Raises:
        UserError: if there is no run, or it is in use by another process or cannot be written.
    """
    path = Path(path)
    _recover(path)
    run = open_run(path)
    partial = _partial(path)
    with writing(path), _locked(partial, wait=False):
        _remove(entry for entry in partial.iterdir() if entry.name != LOCK_FILE)
        shutil.copytree(path, partial, copy_function=_linked, dirs_exist_ok=True, symlinks=True)
        fill(partial)
        values = config.read_json(partial / RUN_FILE)
        write_text(partial / RUN_FILE, seal.sealed(values, seal.contents(partial, (RUN_FILE, LOCK_FILE))))
        (partial / LOCK_FILE).unlink()
        _swap(partial, path)
    return run


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def adopt(path: str | Path, fill: Callable[[Path], None]) -> Run:
    """Give a finished run that was made elsewhere its name here, or keep the one that is there.

    Args:
        path: The run directory.
        fill: Writes the files of the run, `run.json` among them, into the directory that it is given.

    Raises:
        UserError: if `path` is in use by another process or cannot be written, or what was written is no run.
    """
    path = Path(path)
    partial = _partial(path)
    with writing(path), _locked(partial, wait=False):
        if not (path / RUN_FILE).is_file():
            _remove(entry for entry in partial.iterdir() if entry.name != LOCK_FILE)
            fill(partial)
            open_run(partial)
            (partial / LOCK_FILE).unlink()
            _swap(partial, path)
        else:
            shutil.rmtree(partial, ignore_errors=True)
    return open_run(path)


def wait_until_free(path: str | Path, seconds: float) -> bool:
    """Wait until no process is at work on the run directory `path`; False if one still is after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            with open(_partial(Path(path)) / LOCK_FILE) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return True
        except FileNotFoundError:
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(LOCK_SECONDS)


@contextlib.contextmanager
def writing(path: str | Path, option: str = "--out") -> Iterator[None]:
    """Turn failures to write at `path` (no permission, no space) into a UserError that names it and the option."""
    try:
        _make_directory(Path(path).parent)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _system_error(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk of {path} is full; free some space and call again, the run goes on") from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path} cannot be written ({os.strerror(number)}); choose another {option}") from error
        raise


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and is removed when it does not."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, values: Any) -> None:
    """Write plain values (or a configuration) as JSON, whole; NaN and infinities are refused."""
    text = json.dumps(config.to_dict(values), indent=2, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole."""
    with writing(path), atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _leaving_nothing_of_mistakes(partial: Path) -> Iterator[None]:
    """Remove the unfinished run where the user's input was refused before anything worth keeping was done."""
    try:
        yield
    except UserError:
        if not any(any(partial.rglob(name)) for name in (RESUME_FILE, RUN_FILE)):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _same_run(path: Path, stage: str, settings: Any, force: bool) -> Run | None:
    """The finished run at `path`, marked as reused, or None where there is none or it is to be replaced."""
    if not path.exists():
        return None
    if not (path / RUN_FILE).is_file():
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
            return None
        raise UserError(f"{path} exists and is not a run of unsharp; choose another --out, it is left as it is")
    if force:
        return None
    run = open_run(path)
    if run.stage == stage and run.config == settings:
        return Run(run.path, run.stage, run.config, run.provenance, reused=True)
    changed = config.differences({"stage": run.stage, **run.config}, {"stage": stage, **settings})
    changed = [textwrap.shorten(change, 100, placeholder=" …") for change in changed]
    raise UserError(f"{path} holds another run ({listed(changed, 3)}); choose another --out, or --force to replace it")


def _continues(partial: Path, settings: Any, force: bool) -> bool:
    try:
        return not force and json.loads((partial / SETTINGS_FILE).read_text()) == settings
    except (OSError, ValueError):
        return False


def _remove(entries: Iterable[Path]) -> None:
    for entry in list(entries):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextlib.contextmanager
def _locked(directory: Path, wait: bool) -> Iterator[None]:
    """Hold the directory for this process; the lock goes with the process, however it ends."""
    lock = directory / LOCK_FILE
    while True:
        _make_directory(directory)
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(f"another process is at work on {directory.name[1:-8]}; wait for it to end") from None
            # Whoever held it may have finished since it was opened, and taken the directory away.
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                yield
                return


def _system_error(error: BaseException | None) -> int | None:
    """The system's number of an error, also where torch or safetensors raised another one in its place."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__context__
    return None


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # so speak file systems that take no directories, such as /proc
        raise PermissionError(errno.EACCES, "no directory can be made", str(path)) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission", str(path))


def _swap(new: Path, path: Path) -> None:
    """Give the new directory its name; one that stood there is gone only afterwards."""
    old = _old(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _recover(path: Path) -> None:
    """Undo a swap that a kill cut in two."""
    if not path.exists() and _old(path).exists():
        os.replace(_old(path), path)


def _partial(path: Path) -> Path:
    return path.parent / f".{path.name}.partial"


def _old(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _circumstances(more: Mapping[str, Any] | None) -> dict[str, Any]:
    import torch

    from unsharp import runtime

    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    here = runtime.describe(torch.device("cpu"))
    return {**here, **(more or {}), "versions": runtime.versions(), "finished": now}
