"""Seals: each finished run names the sha256 of each of its files, so that a later change of any byte is seen."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsharp.errors import UserError, listed

RUN_FILE = "run.json"
FILES, SEAL = "files", "seal"
CHUNK = 1 << 20
CANNOT_SEE = (
    "Someone who changes a file and writes its run.json anew, seal and all, is not seen by these sums: compare the "
    "digest with one that was kept elsewhere."
)


@dataclass(frozen=True)
class Verified:
    """What a look at a directory found.

    Args:
        path: The directory.
        runs: Number of runs in it.
        files: Number of files in it.
        digest: sha256 over names and contents of all files below, see `digest_of`.
        problems: A line for each file that is not as its run left it; empty where all are.
        loose: Files, relative to the directory, that belong to no run: nothing is known of what they should be.
    """

    path: Path
    runs: int
    files: int
    digest: str
    problems: tuple[str, ...]
    loose: tuple[str, ...]


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def contents(directory: Path, without: Collection[str] = ()) -> dict[str, str]:
    """sha256 of every regular file below a directory, by its path relative to it, in the order of the paths.

    Args:
        directory: The directory. Symbolic links are neither followed nor listed.
        without: Names of files and directories right below it that are passed over.
    """
    files = (name for name in entries_below(directory) if name.split("/")[0] not in without)
    return {name: sha256_of(directory / name) for name in files if _is_file(directory / name)}


def entries_below(directory: Path) -> list[str]:
    """Every path below that is no directory, relative to it, in order; links are entries and are not followed."""

    def look(folder: str, before: str) -> Iterator[str]:
        with os.scandir(folder) as found:
            for entry in found:
                name = before + entry.name
                if entry.is_dir(follow_symlinks=False):
                    yield from look(entry.path, f"{name}/")
                else:
                    yield name

    return sorted(look(str(directory), ""))


def sealed(values: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The text of a `run.json` with the sums of the run's other files, and a sum over itself."""
    whole = {k: v for k, v in values.items() if k not in (FILES, SEAL)} | {FILES: dict(files)}
    return _text(whole | {SEAL: _own_sum(whole)})


def broken(run: Path) -> list[str]:
    """What in a run's directory is not as the run left it, a line each; empty where all is.

    Raises:
        UserError: if the run was written without a seal.
    """
    text = _read(run / RUN_FILE)
    try:
        values = json.loads(text)
    except ValueError:
        return [f"{RUN_FILE} has changed: it is not JSON any more"]
    if not isinstance(values, dict) or not isinstance(values.get(FILES), dict):
        if isinstance(values, dict) and SEAL in values:
            return [f"{RUN_FILE} has changed: it does not list the files of the run"]
        raise UserError(f"{run} has no seal: it is no run, or an earlier version made it; do it again with --force")
    problems = []
    if not _stands(values, text):
        problems.append(f"{RUN_FILE} has changed: it does not have the sum that it names")
    there = [name for name in entries_below(run) if name != RUN_FILE]
    for name, expected in values[FILES].items():
        if name not in there:
            problems.append(f"{name} is missing")
        elif not _is_file(run / name):
            problems.append(f"{name} has changed: it is no file any more")
        elif sha256_of(run / name) != expected:
            problems.append(f"{name} has changed")
    return problems + [f"{name} was added" for name in there if name not in values[FILES]]


def verify(path: str | Path) -> Verified:
    """Compare every file of a run, or of all runs below a directory, with what the runs say of them.

    Raises:
        UserError: if there is no run, or one without a seal.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no directory; give that of a run, or one that holds runs")
    names = entries_below(path)
    runs = runs_among(names)
    if not runs:
        raise UserError(f"{path} holds no run (no {RUN_FILE}); give a directory that a command wrote")
    problems = [f"{run}/{line}" if run else line for run in runs for line in broken(path / run)]
    loose = [name for name in names if not any(run == "" or name.startswith(f"{run}/") for run in runs)]
    sums = {name: sha256_of(path / name) for name in names if _is_file(path / name)}
    return Verified(path, len(runs), len(sums), digest_of(sums), tuple(problems), tuple(loose))


def runs_among(names: Collection[str]) -> list[str]:
    """The outermost directories that hold a `run.json`, from paths of files; "" is where the paths start."""
    homes = {name.removesuffix(RUN_FILE).rstrip("/") for name in names if name.split("/")[-1] == RUN_FILE}
    return sorted(h for h in homes if not any(h != o and (o == "" or h.startswith(f"{o}/")) for o in homes))


def digest_of(sums: Mapping[str, str]) -> str:
    """One sha256 over names and contents, that of `sha256sum` over the lines of `sha256sum` in the order of the names.

    `find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum` gives the same.
    """
    digest = hashlib.sha256()
    for name in sorted(sums, key=os.fsencode):
        shown = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        digest.update(b"\\" if shown != name else b"")
        digest.update(f"{sums[name]}  ".encode() + os.fsencode(shown) + b"\n")
    return digest.hexdigest()


def told(found: Verified, digest: str | None = None) -> list[str]:
    """What was found, in lines; the last names the digest.

    Args:
        found: From `verify`.
        digest: The digest that was kept, to compare with; None compares nothing.
    """
    what = f"{found.files} files of {found.runs} run{'' if found.runs == 1 else 's'}"
    lines = [f"changed: {found.path / line}" for line in found.problems]
    if digest is not None and digest != found.digest:
        lines.append(f"changed: {found.path} has not the digest that was kept ({digest})")
    if not lines:
        lines.append(f"as written: {what} in {found.path}")
    if found.loose:
        lines.append(f"outside any run, so not compared: {listed(found.loose, 3)}")
    return [*lines, f"digest: {found.digest}"]


def _stands(values: Mapping[str, Any], text: bytes) -> bool:
    """Whether the bytes of a `run.json` are the ones that were written, as far as its own sum can tell."""
    inner = {k: v for k, v in values.items() if k != SEAL}
    try:
        return values.get(SEAL) == _own_sum(inner) and text == _text(inner | {SEAL: values[SEAL]}).encode()
    except ValueError:  # a number has become infinite
        return False


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _own_sum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(values).encode()).hexdigest()


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, allow_nan=False) + "\n"
