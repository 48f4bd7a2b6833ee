"""What still derives from samples that were to be deleted, found by what runs say of themselves, and its deletion."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsharp import seal
from unsharp.artifacts import SETTINGS_FILE, wait_until_free
from unsharp.errors import UserError, listed
from unsharp.seal import RUN_FILE

MODEL_SUFFIX = ".safetensors"
UNFINISHED = "unfinished"
HIDDEN = (".partial", ".old", ".gone")
"""Endings of the hidden names that a run has on its way in and out."""
ANSWERS = ("forget", "unlearn")
KINDS = {
    "train": "network trained on the samples",
    "retrain": "retrained network of another request, trained on the samples",
    "memorize": "difficulty scores, the samples' among them",
    "split": "list that names the samples",
    "mask": "mask made from gradients on the samples",
    "tune": "search on the samples",
    "evaluate": "evaluation; it names the samples, and may hold what networks said of them",
    "attack": "attack with networks trained on the samples",
    "relearn": "networks fine-tuned on the samples",
    "landscape": "losses on the samples",
    "forget": "network that forgot other samples, and was trained on these",
    "unlearn": "network that forgot other samples, and was trained on these",
    "cell": "cell of a sweep or shard of a pool on these data",
    UNFINISHED: "unfinished work on these data",
}
BY_DESIGN = "the answer to this request: made from a network that was trained on the samples; kept"


@dataclass(frozen=True)
class Request:
    """What a run is asked about: whether it derives from these samples.

    Args:
        fingerprint: Of the data set.
        forget: Hash of the forget set.
        absent: Hashes of sets that a retrained network may lack to be clean: the forget set, and with what was
            forgotten before.
        checkpoints: sha256 of the files of networks that were trained on the samples.
    """

    fingerprint: str | None
    forget: str
    absent: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Artefact:
    """A directory that derives from the samples.

    Args:
        path: The directory.
        stage: What made it; "unfinished" for what a kill left.
        what: What it is, in words.
        sum: sha256 of its `run.json`; of its settings where it is unfinished.
        bytes: Its size.
        kept: Whether it is the answer to the request, which stays.
    """

    path: Path
    stage: str
    what: str
    sum: str
    bytes: int
    kept: bool

    def public(self) -> dict[str, Any]:
        """What may be told of it to a third party: no name of a directory or file."""
        return {"stage": self.stage, "what": self.what, "sha256": self.sum, "bytes": self.bytes, "kept": self.kept}


def find(request: Request, roots: Sequence[str | Path], *, deep: bool = True) -> list[Artefact]:
    """Every run below some directories that derives from the samples.

    A run derives from them if its configuration, or what it recorded beside it, names the data set, the forget set, or
    the checkpoint of a network that derives from them. Retrained networks that lack the samples do not.

    Args:
        request: Which samples.
        roots: Directories; symbolic links below them are not followed.
        deep: Whether to look below the directories right below `roots`.
    """
    told = [(path, stage, values) for root in roots for path, stage, values in _runs(Path(root), deep)]
    words = {path: set(_words(values)) for path, _, values in told}
    marks = {m for m in (request.fingerprint, request.forget, *request.checkpoints) if m}
    clean = {path for path, stage, values in told if stage == "retrain" and _lacks(values, request)}
    found: dict[Path, tuple[str, Mapping[str, Any]]] = {}
    grown = True
    while grown:
        grown = False
        for path, stage, values in told:
            if path not in found and path not in clean and words[path] & marks:
                found[path], grown = (stage, values), True
                marks |= _networks_of(values)
    return [_artefact(path, stage, values, request) for path, (stage, values) in sorted(found.items())]


def purge(artefacts: Sequence[Artefact], roots: Sequence[str | Path]) -> tuple[list[Artefact], list[str]]:
    """Delete artefacts, each whole or not at all; what a run did not write itself is left where it is.

    Args:
        artefacts: From `find`; those that are kept are passed over.
        roots: The directories they were found in; nothing outside them is touched.

    Returns:
        What was deleted, and a line for each thing that was left, with the reason.

    Raises:
        UserError: if another process is at work on one of them, before anything is deleted.
    """
    asked = [a for a in artefacts if not a.kept]
    for one in asked:
        if not wait_until_free(_final_name(one.path), 0.0):
            raise UserError(f"another process is at work on {one.path}; wait for it to end, nothing was deleted")
    tops = [Path(root).resolve() for root in roots]
    deleted, left = [], []
    for one in asked:
        why = _not_ours(one.path, tops)
        if why is None:
            _delete(one.path)
            deleted.append(one)
            _forget_indices(one.path, tops)
        else:
            left.append(f"{one.path}: {why}")
    return deleted, left


def _forget_indices(path: Path, tops: Collection[Path]) -> None:
    """Delete the indices that told of a run; they are made anew when they are next asked for."""
    from unsharp.index import INDEX_FILE, is_index

    for folder in path.resolve().parents:
        if any(folder == top or top in folder.parents for top in tops) and is_index(folder / INDEX_FILE):
            (folder / INDEX_FILE).unlink()


def _not_ours(path: Path, tops: Collection[Path]) -> str | None:
    """Why a directory must not be deleted; None where every file in it was written by its run, and is as it was."""
    if not any(path.parent.resolve() == top or top in path.parent.resolve().parents for top in tops):
        return "it lies outside the directories that were named"
    if path.is_symlink() or not path.is_dir():
        return "it is no directory any more"
    if _final_name(path) != path:
        # What a kill left has no list of its files yet; its hidden name and its settings are the mark.
        links = [name for name in seal.entries_below(path) if (path / name).is_symlink()]
        return f"it holds links, which unsharp does not make: {listed(links, 3)}" if links else None
    try:
        problems = seal.broken(path)
    except UserError:
        return "it has no seal, so what of it a run wrote cannot be told"
    return (
        f"not all of it is as its run left it ({listed(problems, 3)}); look at it and delete it by hand"
        if problems
        else None
    )


def _delete(path: Path) -> None:
    """Take a directory away: by one renaming, so that it is whole or gone, then file by file, following no link."""
    if path.name.endswith(".gone"):
        _empty(path)
        return
    gone = path.parent / f".{path.name.strip('.')}.gone"
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | getattr(os, "O_NOFOLLOW", 0))
    try:
        shutil.rmtree(gone, ignore_errors=True)  # a kill may have left one, of the same name
        os.rename(path.name, gone.name, src_dir_fd=parent, dst_dir_fd=parent)
    finally:
        os.close(parent)
    _empty(gone)


def _empty(gone: Path) -> None:
    """Delete a renamed run, by which it is known last: after a kill the next call finds it again."""
    for entry in list(os.scandir(gone)):
        if entry.name not in (RUN_FILE, SETTINGS_FILE):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    shutil.rmtree(gone)


def _final_name(path: Path) -> Path:
    """The name of the run that a hidden directory is on its way to, or was."""
    name = path.name
    for ending in HIDDEN:
        if name.startswith(".") and name.endswith(ending):
            return path.parent / name[1 : -len(ending)]
    return path


def _runs(root: Path, deep: bool) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """Each outermost run below a directory, what a kill left too: its path, stage, and what it says of itself."""
    try:
        entries = sorted(os.scandir(root), key=lambda e: e.name)
    except OSError:
        return
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            continue
        path = Path(entry.path)
        values = _read(path / RUN_FILE)
        left = _final_name(path) != path
        if values is not None and isinstance(values.get("stage"), str):
            yield path, UNFINISHED if left else values["stage"], values
        elif left:
            settings = _read(path / SETTINGS_FILE)
            yield from [] if settings is None else [(path, UNFINISHED, {"config": settings})]
        elif deep:
            yield from _runs(path, deep)


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where it is a link, no file, or no object."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _words(values: Any) -> Iterator[str]:
    """Every text in plain values, without the sums of the run's own files."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key not in (seal.FILES, seal.SEAL):
                yield from _words(value)
    elif isinstance(values, list):
        for value in values:
            yield from _words(value)
    elif isinstance(values, str):
        yield values


def _lacks(values: Mapping[str, Any], request: Request) -> bool:
    """Whether a retrained network was trained without the samples, as far as it says which it was without."""
    without = {values.get("config", {}).get("forget"), *values.get("provenance", {}).get("lacks", ())}
    return not without.isdisjoint({request.forget, *request.absent})


def _networks_of(values: Mapping[str, Any]) -> set[str]:
    """sha256 of the networks that a run wrote."""
    files = values.get(seal.FILES)
    return {s for name, s in files.items() if name.endswith(MODEL_SUFFIX)} if isinstance(files, Mapping) else set()


def _artefact(path: Path, stage: str, values: Mapping[str, Any], request: Request) -> Artefact:
    settings = values.get("config", {})
    answer = stage in ANSWERS and request.forget in (settings.get("forget"), *settings.get("before", ()))
    what = KINDS.get(stage, f"work of the stage {stage!r} on these data")
    if answer:
        named = stage == "unlearn"
        what = BY_DESIGN + ("; its split.json names the samples" if named else "")
    file = path / (RUN_FILE if (path / RUN_FILE).is_file() else SETTINGS_FILE)
    size = sum((path / name).lstat().st_size for name in seal.entries_below(path))
    return Artefact(path, stage, what, seal.sha256_of(file), size, answer)
