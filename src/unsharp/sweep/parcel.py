"""A finished run directory as bytes, for the way from a machine that does not see the store."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from unsharp.errors import UserError

MAGIC = b"unsharp run 1\n"
LENGTH = 8
"""Bytes of the number that tells how long the list of files is."""
DIGEST = hashlib.sha256().digest_size


def pack(directory: Path) -> bytes:
    """All files below a directory as bytes: same files, same bytes.

    The names and sizes come first, as JSON, then the contents, then a sha256 of it all. Times and owners are left out.

    Raises:
        UserError: if something there is neither a plain file nor a directory, such as a link.
    """
    names, contents = [], []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(
                f"{path} is neither a file nor a directory, and cannot be sent to the store; write plain files"
            )
        if path.is_dir():
            names.append([name, None])
        else:
            contents.append(path.read_bytes())
            names.append([name, len(contents[-1])])
    head = json.dumps(names).encode()
    parts = [MAGIC, len(head).to_bytes(LENGTH, "big"), head, *contents]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join([*parts, digest.digest()])


def unpack(parcel: bytes, directory: Path) -> None:
    """Write the files of `pack` into a directory that has none of them; nothing outside it is ever written.

    Raises:
        UserError: if the bytes are damaged or no parcel, or a name leads out of the directory.
    """
    for name, content in _files(memoryview(parcel)):
        path = directory / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _files(parcel: memoryview) -> list[tuple[str, memoryview | None]]:
    """Names and contents, None for a directory."""
    damaged = UserError("a run came back damaged from another machine; call again, and the cell is done anew")
    body, digest = parcel[:-DIGEST], parcel[-DIGEST:]
    if bytes(parcel[: len(MAGIC)]) != MAGIC or hashlib.sha256(body).digest() != digest:
        raise damaged
    start = len(MAGIC) + LENGTH
    at = start + int.from_bytes(body[len(MAGIC) : start], "big")
    try:
        listed = [(name, size) for name, size in json.loads(bytes(body[start:at]))]
    except (ValueError, TypeError) as error:
        raise damaged from error
    found = []
    for name, size in listed:
        if not _is_inside(name):
            raise UserError(f"a run came back with a file named {name!r}, which leads out of its directory; refused")
        if size is not None and (type(size) is not int or size < 0):
            raise damaged
        found.append((name, None if size is None else body[at : at + size]))
        at += size or 0
    if at != len(body):
        raise damaged
    return found


def _is_inside(name: Any) -> bool:
    """Whether a name is a plain relative path; a run has no links that could lead elsewhere."""
    return isinstance(name, str) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))
