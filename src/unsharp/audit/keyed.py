"""Ids under a key that stays with their owner: who has no key learns nothing of an id, also not by trying all."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unsharp.errors import UserError

KEY_BYTES = 32
SCHEME = "HMAC-SHA256"


def open_key(path: str | Path) -> bytes:
    """The key in a file; where there is no file, a new one is made that its owner alone can read.

    Raises:
        UserError: if the file can be read by others, or holds no key.
    """
    path = Path(path)
    if not path.exists():
        _make(path)
    try:
        with open(path, encoding="ascii") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise UserError(f"key file {path} can be read by others; make it yours alone: chmod 600 {path}")
            text = file.read().strip()
        key = bytes.fromhex(text)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"key file {path} holds no key ({KEY_BYTES} bytes as hex digits); name another file") from None
    if len(key) < KEY_BYTES:
        raise UserError(f"key file {path} holds {len(key)} bytes; a key has {KEY_BYTES}; name another file")
    return key


def check_outside(key: str | Path, out: str | Path) -> None:
    """Raise UserError where the key would lie in the directory that is handed on."""
    if Path(out).resolve() in Path(key).resolve().parents:
        raise UserError(f"key file {key} lies in {out}, which is handed on; keep the key elsewhere")


def name_of(key: bytes) -> str:
    """What tells one key from another, and nothing of the key."""
    return _code(key, "key", "")[:16]


def code_of(key: bytes, one: Any) -> str:
    """The code of an id."""
    return _code(key, "id", str(one))


def codes_of(key: bytes, ids: Iterable[Any]) -> list[str]:
    """The codes of ids, in an order that says nothing of theirs."""
    return sorted(code_of(key, one) for one in ids)


def code_of_list(key: bytes, ids: Iterable[Any]) -> str:
    """The code of a whole list, whatever its order."""
    return _code(key, "list", json.dumps(sorted(str(one) for one in ids)))


def found_again(key: bytes, ids: Sequence[Any], codes: Iterable[str]) -> list[int]:
    """The positions of those `ids` whose codes are among `codes`."""
    wanted = set(codes)
    return [i for i, one in enumerate(ids) if code_of(key, one) in wanted]


def _code(key: bytes, kind: str, text: str) -> str:
    return hmac.new(key, f"unsharp {kind}\0{text}".encode(), hashlib.sha256).hexdigest()


def _make(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UserError(f"key file {path} cannot be made ({error.strerror}); name another with --key") from None
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")
