"""Difficulty scores from a file, of whatever kind, aligned with a set of samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unsharp.difficulty import published, result
from unsharp.difficulty.files import ID_COLUMNS, as_ids, find, open_table, refuse_repeated, split_spec
from unsharp.difficulty.kinds import ScoreKind, kind_named, kind_names, those_of
from unsharp.difficulty.published import Layout
from unsharp.difficulty.result import SCORES_FILE, SUFFIXES, Scores
from unsharp.errors import UserError, listed

if TYPE_CHECKING:
    from unsharp.data.samples import Samples

# The unnamed index of a pandas frame, as its CSV and parquet writers call it, counts as positions too.
INDEX_COLUMNS = ("index", "", "__index_level_0__")
DEFAULT_KIND = "memorization"
"""What scores are where neither the user nor the file says it."""


def load_scores(spec: str, samples: Samples, *, kind: ScoreKind | None = None) -> np.ndarray:
    """Read the difficulty of each sample from `FILE[:KEY]`, or from the directory of a run.

    Three layouts are understood. With a column `KEY_id` or `id` (or, in a table of two columns, names or whole numbers
    beside the scores) scores belong to ids; with `KEY_index` or `index` they belong to positions in the full source;
    with neither, there is one score for each sample of the full source, in its order. A slice of it is always fine.
    Beyond these, the published files that `unsharp.difficulty.published` lists are read as they are, and the directory
    of a pool of networks gives the memorization that they show.

    What the scores are is said by a column or array `kind` (as files of this library have it), by KEY where it is the
    name of a kind, or by the published layout; else they are memorization scores.

    Args:
        spec: `.npz`, `.csv` or `.parquet` file, or the directory of a run that holds `scores.npz`; KEY is the array or
            column, needed where it is not clear (one called like a kind, or `score`, is taken).
        samples: The samples to be ranked.
        kind: What the scores are: "memorization" (Feldman & Zhang 2020; higher is harder), "cscore" (Jiang et al. 2021;
            lower is harder), or the name of a proxy; None takes what the file says.

    Returns:
        (n,) float64, higher is harder: scores as they are, or negated where a lower score is harder.

    Raises:
        UserError: if the file or key is not there, lengths differ, a sample has no score, a score is not finite, the
            file says that they are of another kind, or its labels are not those of the samples.
    """
    return read_scores(spec, samples, kind=kind).difficulty


def read_scores(spec: str, samples: Samples, *, kind: ScoreKind | None = None) -> Scores:
    """As `load_scores`, with the kind, and with standard errors where the file has them.

    Args:
        spec: As for `load_scores`.
        samples: As for `load_scores`.
        kind: As for `load_scores`.

    Raises:
        UserError: as `load_scores` does.
    """
    if kind is not None:
        check_kind(kind)
    if _is_pool(Path(spec)):
        _settled_kind(kind, DEFAULT_KIND, spec)
        return _of_pool(Path(spec), samples)
    path, key = _located(spec)
    with open_table(path) as table:
        layout = published.recognise(path, list(table)) if path.suffix.lower() == ".npz" else None
        if layout is not None and key in (None, layout.scores):
            return _read_published(table, layout, path, samples, kind)
        return _read_plain(table, path, key, samples, kind)


def as_difficulty(scores: np.ndarray, samples: Samples, kind: ScoreKind) -> np.ndarray:
    """Scores of one kind as difficulties, (n,) float64, higher is harder. Raises: UserError for a score not finite."""
    return as_scores(scores, samples, kind).difficulty


def as_scores(scores: np.ndarray, samples: Samples, kind: ScoreKind) -> Scores:
    """Scores of one kind, (n,), as those of the samples. Raises: UserError for a score not finite."""
    check_kind(kind)
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(samples),):
        raise UserError(f"scores have shape {scores.shape}, the samples need ({len(samples)},)")
    return Scores(kind=kind, raw=scores, ids=samples.ids, positions=samples.source_positions)


def check_kind(kind: str) -> None:
    """Raise UserError unless `kind` is known."""
    kind_named(kind)


def _is_pool(path: Path) -> bool:
    """Whether this is a directory of shards of networks, and no run."""
    from unsharp.pool.store import Pool

    return path.is_dir() and not (path / SCORES_FILE).exists() and bool(Pool(path).members())


def _of_pool(path: Path, samples: Samples) -> Scores:
    """The memorization that the networks of a pool show."""
    from unsharp.difficulty.memorization import memorization
    from unsharp.pool.store import Pool

    outputs = Pool(path).outputs()
    if not np.array_equal(outputs.train.labels, samples.labels):
        raise UserError(
            f"{path} is a pool of networks on other samples or labels; train one on these: unsharp memorize"
        )
    found = memorization(outputs.inside, outputs.train.correct)
    if holes := int((~np.isfinite(found.memorization)).sum()):
        raise UserError(
            f"{path}: {holes} of {len(samples)} samples were in all of its {len(outputs)} networks, or in none, and so "
            "have no score; train more: unsharp memorize --models"
        )
    return Scores(
        kind=DEFAULT_KIND,
        raw=found.memorization,
        ids=samples.ids,
        positions=samples.source_positions,
        standard_error=found.standard_error,
        labels=samples.labels,
        provenance={"pool": path.name, "networks": len(outputs)},
    )


def _located(spec: str) -> tuple[Path, str | None]:
    """File and key of `FILE[:KEY]` or `DIRECTORY[:KEY]`."""
    found = split_spec(spec, SUFFIXES)
    if found is not None and not found[0].is_dir():
        return found
    directory, colon, key = spec.rpartition(":")
    place, key = (Path(directory), key) if colon and Path(directory).is_dir() else (Path(spec), None)
    if not spec or not place.is_dir():
        raise UserError(
            f"scores {spec!r} must be FILE[:KEY] with a file that ends in {', '.join(SUFFIXES)}, or the directory of a "
            f"run that holds {SCORES_FILE}"
        )
    if not (place / SCORES_FILE).is_file():
        raise UserError(f"directory {str(place)!r} holds no {SCORES_FILE}; give that of a run that estimated scores")
    return place / SCORES_FILE, key


def _read_plain(
    table: Mapping[str, np.ndarray], path: Path, key: str | None, samples: Samples, kind: ScoreKind | None
) -> Scores:
    stated = _stated_kind(table, path)
    key = _score_column(table, key, stated, path)
    kind = _settled_kind(kind, _kind_of_column(key, stated), f"{path}:{key}") or DEFAULT_KIND
    scores = _floats(table[key], f"{path}:{key}")
    where, by_id = _where_column(table, key, two_columns=path.suffix.lower() != ".npz" and len(table) == 2)
    if where is None:
        rows = _by_order(scores, samples, f"{path}:{key}")
    else:
        owners = table[where]
        if owners.shape != scores.shape:
            raise UserError(f"{path}: {key!r} has shape {scores.shape}, {where!r} has {owners.shape}; they must agree")
        rows = (_by_id if by_id else _by_position)(owners, samples, f"{path}:{where}")
    if stated is not None and result.LABELS in table:
        labels = _floats(table[result.LABELS], f"{path}:{result.LABELS}").astype(np.int64)
        published.check_labels(_rows_of(labels, rows, path), samples.labels, str(path), named=where is not None)
    error = next((n for n in (f"{key}_se", result.ERROR) if n in table and (n != result.ERROR or key == stated)), None)
    errors = None if error is None else _rows_of(_floats(table[error], f"{path}:{error}"), rows, path)
    return Scores(
        kind=kind,
        raw=scores[rows],
        ids=samples.ids,
        positions=samples.source_positions,
        standard_error=errors,
        provenance=_provenance(table),
    )


def _read_published(
    table: Mapping[str, np.ndarray], layout: Layout, path: Path, samples: Samples, kind: ScoreKind | None
) -> Scores:
    source = f"{path} ({layout.title})"
    kind = _settled_kind(kind, layout.kind, str(path))
    if kind is None:
        raise UserError(
            f"{path} holds scores and labels, as the published C-scores do, but its name does not say that they are "
            "such; say what they are (score kind), and its labels are compared with the data's"
        )
    scores = _floats(table[layout.scores], f"{path}:{layout.scores}")
    if layout.filenames is not None:
        names, ids = published.match_names(published.read_names(path, layout.filenames), samples.ids, source)
        rows = _of_all(*find(ids, names), samples, source)
    elif layout.positions is not None:
        positions, first = np.unique(table[layout.positions], return_index=True)
        rows = first[_by_position(positions, samples, f"{path}:{layout.positions}")]
    else:
        rows = _by_order(scores, samples, source)
    if layout.labels is not None:
        labels = _rows_of(table[layout.labels], rows, path)
        published.check_labels(labels, samples.labels, source, named=layout.filenames is not None)
    about = {"file": path.name, "layout": layout.title}
    return Scores(kind=kind, raw=scores[rows], ids=samples.ids, positions=samples.source_positions, provenance=about)


def _stated_kind(table: Mapping[str, np.ndarray], path: Path) -> ScoreKind | None:
    """The kind of which a file of this library says its scores are; None where it says nothing."""
    if result.KIND not in table:
        return None
    found = np.unique(table[result.KIND].astype(str))
    if len(found) != 1 or found[0] not in table:
        return None
    name = str(found[0])
    if name not in kind_names():
        raise UserError(f"{path} holds scores of kind {name!r}, which is not known; {listed(kind_names())} are")
    return name


def _kind_of_column(key: str, stated: ScoreKind | None) -> ScoreKind | None:
    """The kind that a column has by its own name, which is also how a file of this library says it."""
    return key if key == stated or key in kind_names() else None


def _settled_kind(given: ScoreKind | None, found: ScoreKind | None, source: str) -> ScoreKind | None:
    if given is not None and found is not None and given != found:
        raise UserError(
            f"{source} holds scores of kind {found!r}, not {given!r}; leave the kind out, or choose another column"
        )
    return given or found


def _score_column(table: Mapping[str, np.ndarray], key: str | None, stated: ScoreKind | None, path: Path) -> str:
    names = list(table)
    if key is not None:
        if key not in names:
            raise UserError(f"{path} has no {key!r}; it has: {', '.join(names) or 'nothing'}")
        return key
    if stated is not None:
        return stated
    owners = {*ID_COLUMNS, *INDEX_COLUMNS, *(f"{n}_{end}" for n in names for end in ("id", "index"))}
    rest = [n for n in names if n not in owners]
    if "score" in rest or len(rest) == 1:
        return "score" if "score" in rest else rest[0]
    kinds = those_of(rest)
    if len(kinds) == 1:
        return kinds[0]
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


def _provenance(table: Mapping[str, np.ndarray]) -> dict[str, object]:
    """What an archive of this library says of its origin; nothing where it is another's."""
    if result.PROVENANCE not in table or table[result.PROVENANCE].ndim:
        return {}
    try:
        found = json.loads(str(table[result.PROVENANCE]))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _rows_of(values: np.ndarray, rows: np.ndarray, path: Path) -> np.ndarray:
    if values.ndim != 1 or (len(rows) and int(rows.max()) >= len(values)):
        raise UserError(f"{path}: its columns are of unequal length; it is damaged")
    return values[rows]


def _by_order(scores: np.ndarray, samples: Samples, source: str) -> np.ndarray:
    if len(scores) != samples.source_size:
        raise UserError(
            f"{source} has {len(scores)} scores, the full data set has {samples.source_size} samples; scores are "
            "aligned by position in the full data set (a slice of it is fine), so give one for each, or an id column"
        )
    return samples.source_positions


def _by_position(positions: np.ndarray, samples: Samples, source: str) -> np.ndarray:
    positions = as_ids(positions, np.empty(0, np.int64), source)
    outside = positions[(positions < 0) | (positions >= samples.source_size)].tolist()
    if outside:
        raise UserError(f"{source}: out of range 0..{samples.source_size - 1}: {listed(outside)}")
    refuse_repeated(positions, source)
    return _of_all(*find(np.asarray(samples.source_positions), positions), samples, source)


def _by_id(ids: np.ndarray, samples: Samples, source: str) -> np.ndarray:
    ids = as_ids(ids, samples.ids, source)
    refuse_repeated(ids, source)
    return _of_all(*find(samples.ids, ids), samples, source)


def _of_all(rows: np.ndarray, known: np.ndarray, samples: Samples, source: str) -> np.ndarray:
    missing = samples.ids[~known].tolist()
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(samples)} samples have no score, ids {listed(missing)}; "
            "score every sample, or take the data set's scored part"
        )
    return rows
