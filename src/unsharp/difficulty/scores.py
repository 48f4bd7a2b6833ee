"""Difficulty scores from a file: memorization scores and C-scores, aligned with a set of samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from unsharp.difficulty.files import ID_COLUMNS, as_ids, find, open_table, refuse_repeated, split_spec
from unsharp.errors import UserError, listed, unknown

if TYPE_CHECKING:
    from unsharp.data.samples import Samples

ScoreKind = Literal["memorization", "cscore"]
SCORE_KINDS: dict[str, str] = {"memorization": "memorization score", "cscore": "C-score"}
SUFFIXES = (".npz", ".csv", ".parquet")
# The unnamed index of a pandas frame, as its CSV and parquet writers call it, counts as positions too.
INDEX_COLUMNS = ("index", "", "__index_level_0__")


def load_scores(spec: str, samples: Samples, *, kind: ScoreKind) -> np.ndarray:
    """Read the difficulty of each sample from `FILE[:KEY]`.

    Three layouts are understood. With a column `KEY_id` or `id` (or, in a table of two columns, names or whole numbers
    beside the scores) scores belong to ids; with `KEY_index` or `index` they belong to positions in the full source;
    with neither, there is one score for each sample of the full source, in its order. A slice of it is always fine.

    Args:
        spec: `.npz`, `.csv` or `.parquet` file; KEY is the array or column, needed where it is not the only one
            (a column called `score` is taken).
        samples: The samples to be ranked.
        kind: "memorization" (Feldman & Zhang 2020; higher is harder) or "cscore" (Jiang et al. 2021; lower is harder).

    Returns:
        (n,) float64, higher is harder: memorization scores as they are, C-scores negated.

    Raises:
        UserError: if the file or key is not there, lengths differ, a sample has no score, or a score is not finite.
    """
    check_kind(kind)
    found = split_spec(spec, SUFFIXES)
    if found is None:
        raise UserError(f"scores {spec!r} must be FILE[:KEY] with a file that ends in {', '.join(SUFFIXES)}")
    path, key = found
    with open_table(path) as table:
        key = _score_column(table, key, path)
        scores = _floats(table[key], f"{path}:{key}")
        where, by_id = _where_column(table, key, two_columns=path.suffix.lower() != ".npz" and len(table) == 2)
        owners = None if where is None else table[where]
    if owners is None:
        aligned = _by_order(scores, samples, f"{path}:{key}")
    else:
        if owners.shape != scores.shape:
            raise UserError(f"{path}: {key!r} has shape {scores.shape}, {where!r} has {owners.shape}; they must agree")
        aligned = (_by_id if by_id else _by_position)(scores, owners, samples, f"{path}:{where}")
    return as_difficulty(aligned, samples, kind)


def as_difficulty(scores: np.ndarray, samples: Samples, kind: ScoreKind) -> np.ndarray:
    """Scores of one kind as difficulties, (n,) float64, higher is harder. Raises: UserError for a score not finite."""
    check_kind(kind)
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(samples),):
        raise UserError(f"scores have shape {scores.shape}, the samples need ({len(samples)},)")
    bad = samples.ids[~np.isfinite(scores)].tolist()
    if bad:
        raise UserError(f"scores: {len(bad)} samples have a NaN or infinite score, ids {listed(bad)}; mend the file")
    return -scores if kind == "cscore" else scores


def check_kind(kind: str) -> None:
    """Raise UserError unless `kind` is known."""
    if kind not in SCORE_KINDS:
        raise unknown("score kind", kind, SCORE_KINDS)


def _score_column(table: Mapping[str, np.ndarray], key: str | None, path: Path) -> str:
    names = list(table)
    if key is not None:
        if key not in names:
            raise UserError(f"{path} has no {key!r}; it has: {', '.join(names) or 'nothing'}")
        return key
    owners = {*ID_COLUMNS, *INDEX_COLUMNS, *(f"{n}_{end}" for n in names for end in ("id", "index"))}
    rest = [n for n in names if n not in owners]
    if "score" in rest or len(rest) == 1:
        return "score" if "score" in rest else rest[0]
    raise UserError(f"{path} holds {', '.join(names) or 'nothing'}; say which are the scores: {path}:KEY")


def _where_column(table: Mapping[str, np.ndarray], key: str, two_columns: bool) -> tuple[str | None, bool]:
    """The column that says whose the scores are, and whether it holds ids (else positions in the full source)."""
    for names, by_id in (((f"{key}_id", *ID_COLUMNS), True), ((f"{key}_index", *INDEX_COLUMNS), False)):
        for name in names:
            if name in table and name != key:
                return name, by_id
    beside = next((name for name in table if name != key), None) if two_columns else None
    return (beside, True) if beside is not None and not _holds_fractions(table[beside]) else (None, False)


def _holds_fractions(values: np.ndarray) -> bool:
    """Whether these are scores of another kind rather than ids: numbers, and not all of them whole."""
    try:
        numbers = values.astype(np.float64)
    except (TypeError, ValueError):
        return False
    return bool((numbers != np.floor(numbers)).any())


def _floats(values: np.ndarray, source: str) -> np.ndarray:
    if values.ndim != 1 or values.dtype.kind not in "iufUO":
        raise UserError(f"{source} must be one-dimensional and numeric, it is {values.dtype} of shape {values.shape}")
    if values.dtype.kind == "U":
        values = np.where(values == "", "nan", values)  # an empty cell is a missing score
    try:
        return values.astype(np.float64)
    except (TypeError, ValueError):
        bad = [str(v) for v in values if not _is_number(v)]
        raise UserError(f"{source}: {len(bad)} entries are not numbers: {listed([repr(b) for b in bad])}") from None


def _is_number(value: object) -> bool:
    try:
        float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return False
    return True


def _by_order(scores: np.ndarray, samples: Samples, source: str) -> np.ndarray:
    if len(scores) != samples.source_size:
        raise UserError(
            f"{source} has {len(scores)} scores, the full data set has {samples.source_size} samples; scores are "
            "aligned by position in the full data set (a slice of it is fine), so give one for each, or an id column"
        )
    return scores[samples.source_positions]


def _by_position(scores: np.ndarray, positions: np.ndarray, samples: Samples, source: str) -> np.ndarray:
    positions = as_ids(positions, np.empty(0, np.int64), source)
    outside = positions[(positions < 0) | (positions >= samples.source_size)].tolist()
    if outside:
        raise UserError(f"{source}: out of range 0..{samples.source_size - 1}: {listed(outside)}")
    refuse_repeated(positions, source)
    return _of_all(scores, *find(np.asarray(samples.source_positions), positions), samples, source)


def _by_id(scores: np.ndarray, ids: np.ndarray, samples: Samples, source: str) -> np.ndarray:
    ids = as_ids(ids, samples.ids, source)
    refuse_repeated(ids, source)
    return _of_all(scores, *find(samples.ids, ids), samples, source)


def _of_all(scores: np.ndarray, rows: np.ndarray, known: np.ndarray, samples: Samples, source: str) -> np.ndarray:
    missing = samples.ids[~known].tolist()
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(samples)} samples have no score, ids {listed(missing)}; "
            "score every sample, or take the data set's scored part"
        )
    return scores[rows]
