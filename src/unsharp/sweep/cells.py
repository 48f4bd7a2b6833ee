"""One cell of a sweep: a function and its arguments, named by their hash, done once."""

from __future__ import annotations

import functools
import inspect
import json
import pkgutil
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from unsharp import config
from unsharp.artifacts import RUN_FILE, Run, Workspace, open_run, perform, write_json
from unsharp.errors import UserError

STAGE = "cell"
RESULT_FILE = "result.json"
SHORT = 40
"""Characters up to which an argument is shown in a message."""


class SweepError(RuntimeError):
    """A sweep ended before all of its cells were done; what was finished is kept."""


@dataclass(frozen=True)
class Cell:
    """A piece of work that depends on nothing but what is written here.

    Args:
        function: "package.module:name". It is called with the arguments by name, and with `workspace` (a
            `Workspace`, to keep files and resumable state) if it has a parameter of that name. It returns a JSON
            value, or None.
        arguments: JSON values and configurations. The function gets them as plain JSON values: a tuple as a list, a
            configuration as a dictionary.

    Raises:
        UserError: if an argument is not JSON.
    """

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        try:
            plain = json.loads(json.dumps(config.to_dict(self.arguments), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"arguments of cell {self.function} must be JSON ({error}); give numbers, text, lists, dictionaries"
            ) from None
        object.__setattr__(self, "arguments", plain)

    @functools.cached_property
    def key(self) -> str:
        """sha256 (hex) of function and arguments: the name of the cell's directory."""
        return config.digest(self)

    def __str__(self) -> str:
        shown = ", ".join(f"{k}={_short(v)}" for k, v in self.arguments.items())
        return f"{self.function}({shown})"

    def bind(self, workspace: Workspace | None = None) -> Callable[[], Any]:
        """The call that does the work. Raises: UserError if there is no such function or it takes other arguments."""
        function = _imported(self.function)
        try:
            signature = inspect.signature(function)
            extra = {"workspace": workspace} if "workspace" in signature.parameters else {}
            bound = signature.bind(**self.arguments, **extra)
        except (TypeError, ValueError) as error:
            raise UserError(f"cell {self} does not fit its function: {error}") from None
        return functools.partial(function, *bound.args, **bound.kwargs)


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result.

    Args:
        kind: "mistake" (a UserError), "failed" (any other exception) or "died" (its process was killed or left).
        message: One line.
        trace: The traceback of an exception that is no UserError, else empty.
    """

    kind: Literal["mistake", "failed", "died"]
    message: str
    trace: str = ""


@dataclass(frozen=True)
class Result:
    """What became of a cell.

    Args:
        cell: The cell.
        path: Its run directory, or None if it failed.
        value: What the function returned, as it is stored in `result.json`.
        error: Why it failed, or None.
        seconds: How long it took when it was done or tried last.
        reused: True if it was found done.
        record: Where a failed cell is written down whole, with its error; None where that could not be.
        shown: What messages call the cell; "" for its function and arguments.
    """

    cell: Cell
    path: Path | None = None
    value: Any = None
    error: Failure | None = None
    seconds: float = 0.0
    reused: bool = False
    record: Path | None = None
    shown: str = ""

    @property
    def told(self) -> str:
        """What failed and why, in a line; "" where nothing did."""
        return "" if self.error is None else f"{self.shown or self.cell}: {self.error.message}"


def finished(cell: Cell, store: Path) -> Result | None:
    """The result of a cell that is done, or None."""
    path = store / cell.key
    return _result(cell, replace(open_run(path, STAGE), reused=True)) if (path / RUN_FILE).is_file() else None


def failed_before(cell: Cell, store: Path) -> Result | None:
    """The failure of a cell that is not done and ended by its own error when it was tried before, or None."""
    path = _record(cell, store)
    if not path.is_file():
        return None
    try:
        error = config.from_dict(Failure, config.read_json(path)["error"])
    except (UserError, KeyError, TypeError):  # not as this version writes it: as good as none
        return None
    return None if error.kind == "died" else Result(cell, error=error, record=path)


def run_cell(cell: Cell, store: Path) -> Result:
    """Do a cell in this process, or find it done; its failure is returned, never raised."""
    start = time.perf_counter()
    provenance: dict[str, Any] = {}

    def work(workspace: Workspace) -> None:
        value = cell.bind(workspace)()
        if value is not None:
            workspace.write_json(RESULT_FILE, value)
        provenance["seconds"] = time.perf_counter() - start  # recorded with the rest once the work is done

    try:
        return _result(cell, perform(store / cell.key, STAGE, config.to_dict(cell), work, provenance=provenance))
    except UserError as mistake:
        error = Failure("mistake", str(mistake))
    except (Exception, SystemExit) as failure:
        error = Failure("failed", f"{type(failure).__name__}: {failure}", traceback.format_exc())
    return Result(cell, error=error, seconds=time.perf_counter() - start)


def written_down(result: Result, store: Path) -> Result:
    """The same result; if it failed, the whole cell, its error and the traceback stand in a file, which it names."""
    path = _record(result.cell, store)
    if result.error is None:
        path.unlink(missing_ok=True)
        return result
    try:
        write_json(path, config.to_dict(result.cell) | {"error": config.to_dict(result.error)})
    except (OSError, UserError):  # the disk may be full, and it is the error itself that must be told
        return result
    return replace(result, record=path)


def report(results: Iterable[Result]) -> str:
    """All failures as text, first the mistakes: what failed, why, and where the whole is written; "" for none."""
    distinct = {result.cell.key: result for result in results}.values()
    failed = [(result, result.error) for result in distinct if result.error is not None]
    if not failed:
        return ""
    lines = [f"{len(failed)} of {len(distinct)} cells failed"]
    for kind in ("mistake", "died", "failed"):
        for result, error in failed:
            if error.kind == kind:
                more = error.trace.splitlines() if result.record is None else [f"the whole: {result.record}"]
                lines += [f"{kind}: {result.told}", *(f"    {line}" for line in more)]
    return "\n".join(lines)


def _record(cell: Cell, store: Path) -> Path:
    """Where the failure of a cell is written down."""
    return store / f".{cell.key}.failed.json"


def _result(cell: Cell, run: Run) -> Result:
    value = run.json(RESULT_FILE) if run.file(RESULT_FILE).exists() else None
    return Result(cell, run.path, value, seconds=run.provenance["seconds"], reused=run.reused)


def _short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= SHORT else "…"


def _imported(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if not module or not attribute or module == "__main__":  # a script's own name would not tell two scripts apart
        raise UserError(f"cell function {name!r} must read 'package.module:name', of a module that can be imported")
    try:
        function = pkgutil.resolve_name(name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"cell function {name!r} cannot be imported ({reason}); check its name and sys.path") from error
    if not callable(function):
        raise UserError(f"cell function {name!r} is a {type(function).__name__}, not a function")
    return function
