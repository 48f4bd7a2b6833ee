"""Reads the files in which samples are named: lists of ids, and tables with a column of scores."""

from __future__ import annotations

import csv
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import numpy as np

from unsharp.errors import UserError, listed

ID_COLUMNS = ("id", "ids", "sample_id")


def split_spec(spec: str, suffixes: Sequence[str]) -> tuple[Path, str | None] | None:
    """`FILE[:KEY]` as (file, key or None); None where FILE does not end in one of `suffixes`.

    A colon divides only behind a suffix, so the drive of a Windows path ("C:\\x.npz:key") stays with the file.
    """
    endings = "|".join(re.escape(s) for s in suffixes)
    found = re.fullmatch(rf"(.*?(?:{endings}))(?::(.+))?", spec, re.IGNORECASE | re.DOTALL)
    return None if found is None else (Path(found[1]), found[2])


def as_ids(values: Iterable[object], like: np.ndarray, source: str) -> np.ndarray:
    """`values` as ids of the kind of `like`: "00012" is 12 among integers and stays "00012" among strings.

    Args:
        values: Any objects; they are read through their text.
        like: Ids of the data set, integer or string dtype.
        source: Where the values come from, for the error.

    Raises:
        UserError: if the data set's ids are integers and some values are not.
    """
    values = list(values)
    if like.dtype.kind not in "iu":
        return np.array([str(v) for v in values], dtype=str)
    texts = [str(v).strip() for v in values]
    bad = [repr(t) for t in texts if not re.fullmatch(r"[+-]?[0-9]{1,18}", t)]
    if bad:
        raise UserError(
            f"{source}: the data set's ids are integers, but these are not: {listed(bad)}; where the samples have ids "
            "of their own, say which (--id-column, or ids= of from_torch_dataset)"
        )
    return np.array([int(t) for t in texts], dtype=np.int64)


def find(wanted: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `wanted` stands in `ids` (which must be distinct), and whether it does at all."""
    if len(ids) == 0:
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    order = np.argsort(ids, kind="stable")
    nearest = np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)
    positions = order[nearest]
    return positions, ids[positions] == wanted


def refuse_repeated(values: np.ndarray, source: str) -> None:
    """Raise UserError naming the values that occur more than once."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) < len(values):
        repeated = distinct[counts > 1].tolist()
        raise UserError(f"{source}: {len(repeated)} occur more than once: {listed(repeated)}; name each sample once")


def read_ids(spec: str, id_column: str | None = None) -> list[object]:
    """The ids in a file: `.json` (a list, or {"ids": [...]}), `.csv[:COLUMN]`, or text with one id per line.

    In text, blank lines and lines that begin with # are skipped. A CSV file of one column needs no header; with more
    columns the ids are in `COLUMN`, in the one called `id_column`, or in the one called id, ids or sample_id.

    Args:
        spec: The file.
        id_column: What the data set calls its ids, so that a CSV file may call them so too.

    Raises:
        UserError: if the file cannot be read as what its name says.
    """
    as_csv = split_spec(spec, [".csv"])
    if as_csv is not None:
        return _csv_ids(*as_csv, id_column)
    path = Path(spec)
    text = _text(path)
    if path.suffix.lower() == ".json":
        return _json_ids(text, path)
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


@contextmanager
def open_table(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The named columns of an `.npz`, `.csv` or `.parquet` file; those of a CSV file are strings.

    Raises:
        UserError: if the file is missing or broken, or holds pickled objects.
    """
    try:
        if path.suffix.lower() == ".npz":
            with path.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise UserError(f"{path} is a single array, not an .npz archive; write it with numpy.savez")
                with archive:
                    yield archive
        elif path.suffix.lower() == ".csv":
            header, *rows = _csv_rows(path)
            yield {name: np.array([row[i] for row in rows], dtype=str) for i, name in enumerate(header)}
        else:
            yield _parquet(path)
    except UserError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from None


def _parquet(path: Path) -> Mapping[str, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        # Encoded images stand in structs or binary columns: no score or id is there, and they are large.
        flat = [f.name for f in file.schema_arrow if not (pa.types.is_nested(f.type) or pa.types.is_binary(f.type))]
        table = file.read(columns=flat)
    return {name: table[name].to_numpy() for name in flat}


def _csv_ids(path: Path, column: str | None, id_column: str | None) -> list[object]:
    header, *rows = _csv_rows(path)
    if column is None and id_column in header:
        column = id_column
    if column is None:
        known = [name for name in header if name.lower() in ID_COLUMNS]
        if not known and len(header) == 1:
            return [header[0], *(row[0] for row in rows)]
        if len(known) != 1:
            raise UserError(f"{path} has the columns {listed(header)}; say which holds the ids: {path}:COLUMN")
        column = known[0]
    if column not in header:
        raise UserError(f"{path} has no column {column!r}; it has {listed(header)}")
    at = header.index(column)
    return [row[at] for row in rows]


def _csv_rows(path: Path) -> list[list[str]]:
    """Header and rows of a CSV file, all of one length, cells stripped; blank lines are skipped."""
    try:
        reader = csv.reader(StringIO(_text(path), newline=""), strict=True)
        rows = [[cell.strip() for cell in row] for row in reader if row]
    except csv.Error as error:
        raise _unreadable(path, error) from None
    if not rows:
        raise UserError(f"{path} is empty")
    uneven = [i for i, row in enumerate(rows, 1) if len(row) != len(rows[0])]
    if uneven:
        raise UserError(f"{path}: the header has {len(rows[0])} columns, but these rows do not: {listed(uneven)}")
    if len(set(rows[0])) < len(rows[0]):
        raise UserError(f"{path}: two columns have the same name: {listed(rows[0])}")
    return rows


def _json_ids(text: str, path: Path) -> list[object]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _unreadable(path, error) from None
    ids = content.get("ids") if isinstance(content, dict) else content
    if not isinstance(ids, list):
        raise UserError(f'{path} must hold a list of ids, or an object {{"ids": [...]}}')
    bad = [json.dumps(v) for v in ids if isinstance(v, bool) or not isinstance(v, int | str)]
    if bad:
        raise UserError(f"{path}: ids are integers or strings, these are neither: {listed(bad)}")
    return ids


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    if not path.exists():
        return UserError(f"file {str(path)!r} does not exist")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"file {str(path)!r} cannot be read: {reason.splitlines()[0]}")
