"""One file that tells of all runs below a directory, brought up to date when it is read; it needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unsharp import config
from unsharp.artifacts import write_text
from unsharp.errors import UserError
from unsharp.report import groups
from unsharp.seal import RUN_FILE

INDEX_FILE = ".unsharp-index.json"
VERSION = 1
FIGURES = ("retain_accuracy", "forget_accuracy", "test_accuracy", "tow", "seconds")
WITH_GAP = FIGURES[:3]
FACTS = ("method", "rule", "unlearn", "origin", "forget", "metrics")
"""What an evaluation, or the result of a cell, has where it tells of a network that forgot."""


@dataclass
class Index:
    """What is known of the runs below a directory.

    Args:
        root: The directory.
        runs: By path below it: stage, hash, when it was finished, and of an evaluated network its group, seed, figures
            and gaps.
        groups: By digest, what evaluated networks that differ in the seed alone have in common: title, settings, task.
        read: How many runs had to be read anew.
    """

    root: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    read: int = 0

    def evaluated(self) -> dict[str, list[dict[str, Any]]]:
        """The evaluated networks by group, in the order of their paths."""
        found: dict[str, list[dict[str, Any]]] = {}
        for path, run in sorted(self.runs.items()):
            if "group" in run:
                found.setdefault(run["group"], []).append(run | {"path": path})
        return found


def read_index(root: str | Path) -> Index:
    """What is known of all runs below a directory; of those that are new or have changed, it is read.

    A run is taken for the one that was read before while its `run.json` has the same time, size and inode. The file is
    written again where something changed, if that is possible.

    Raises:
        UserError: if there is no such directory.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is no directory; give one that holds runs")
    before = _load(root / INDEX_FILE)
    index = Index(root, groups=dict(before.get("groups", {})))
    known = before.get("runs", {})
    for path, mark in _marks(root):
        run = known.get(path)
        if run is None or run["mark"] != mark:
            run, index.read = {"mark": mark, **_read(root / path, index.groups)}, index.read + 1
        index.runs[path] = run
    used = {run["group"] for run in index.runs.values() if "group" in run}
    index.groups = {name: group for name, group in index.groups.items() if name in used}
    if index.read or len(known) != len(index.runs):
        content = {"version": VERSION, "runs": index.runs, "groups": index.groups}
        with contextlib.suppress(OSError, UserError):  # a directory that is only read is indexed each time anew
            write_text(root / INDEX_FILE, json.dumps(content, separators=(",", ":"), allow_nan=False))
    return index


def is_index(path: Path) -> bool:
    """Whether a file is an index that this version wrote."""
    return not path.is_symlink() and bool(_load(path))


def _load(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and values.get("version") == VERSION else {}


def _marks(root: Path) -> Iterator[tuple[str, list[int]]]:
    """Each outermost run below, as a path relative to the root, with what tells whether it is another one."""

    def look(folder: str, before: str) -> Iterator[tuple[str, list[int]]]:
        with os.scandir(folder) as entries:
            found = sorted((e.name, e.path) for e in entries if e.name[0] != "." and e.is_dir(follow_symlinks=False))
        for name, path in found:
            try:
                told = os.stat(f"{path}/{RUN_FILE}", follow_symlinks=False)
            except OSError:
                yield from look(path, f"{before}{name}/")
                continue
            yield f"{before}{name}", [told.st_mtime_ns, told.st_size, told.st_ino]

    yield from look(str(root), "")


def _read(path: Path, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the index keeps of a run; its group joins `known`."""
    run = _json(path / RUN_FILE)
    found = {
        "stage": str(run.get("stage", "unknown")),
        "hash": str(run.get("hash", ""))[:16],
        "finished": str((run.get("provenance") or {}).get("finished", "")),
    }
    facts = _facts(path)
    if facts is None:
        return found
    metrics, settings = facts["metrics"], {k: v for k, v in facts["unlearn"].items() if k != "seed"}
    if facts.get("corrections"):
        settings["corrected"] = True  # no group with runs that removed the samples
    task = groups._task_key(facts)
    name = config.digest(task, settings)[:16]
    known[name] = {
        "title": groups.method_title(facts),
        "settings": {k: groups.shown(k, v) for k, v in groups.flatten(settings).items()},
        "task": groups._task(facts, "").__dict__,
        "task_key": task[:16],
    }
    figures = {k: metrics.get(k) for k in FIGURES}
    gaps = {k: (metrics.get("gap") or {}).get(k) for k in WITH_GAP}
    return found | {"group": name, "seed": facts["unlearn"].get("seed", 0), "figures": figures, "gaps": gaps}


def _facts(path: Path) -> Mapping[str, Any] | None:
    """What an evaluated network is told of by; None where the run tells of none."""
    about = _json(path / "about.json")
    facts = about | {"metrics": _json(path / "metrics.json")} if about else _json(path / "result.json")
    try:
        return facts if all(isinstance(facts[name], Mapping) and facts[name] for name in FACTS) else None
    except KeyError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
