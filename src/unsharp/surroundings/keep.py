"""What is finished of a longer measurement, kept in files from which a killed run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from unsharp import artifacts
from unsharp.artifacts import Workspace
from unsharp.config import read_json
from unsharp.errors import NonFiniteError, UserError
from unsharp.surroundings.findings import plain


class Kept:
    """What is finished, each in a file of its own; a measurement that broke down is None, and its reason is kept.

    Args:
        workspace: Where; None keeps nothing.
        identity: What the work is, from which no other goes on.
    """

    def __init__(self, workspace: Workspace | None, identity: str) -> None:
        self._workspace, self._identity = workspace, identity
        self.reasons: dict[str, str] = {}

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The plain values of that name, found or computed."""
        room = self.room("measured")
        path = None if room is None else room.path / f"{name}.json"
        found = self._read(path)
        if found is None:
            found = self._computed(compute)
            if path is not None:
                artifacts.write_json(path, found)
        if found["reason"] is not None:
            self.reasons[name] = found["reason"]
        return found["values"]

    def room(self, name: str) -> Workspace | None:
        """A place of its own in the workspace; as its name is hidden, it goes when the run is whole."""
        if self._workspace is None:
            return None
        path = self._workspace.path / f".{name}"
        path.mkdir(exist_ok=True)
        return Workspace(path)

    def _read(self, path: Path | None) -> dict[str, Any] | None:
        if path is None or not path.is_file():
            return None
        found = read_json(path)
        if found["identity"] != self._identity:
            raise UserError(f"{path.parent} holds unfinished work of another kind; take another place")
        return found

    def _computed(self, compute: Callable[[], Any]) -> dict[str, Any]:
        values, reason = None, None
        try:
            values = plain(compute())
        except NonFiniteError as error:
            reason = str(error)
        return {"identity": self._identity, "values": values, "reason": reason}
