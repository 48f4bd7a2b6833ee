"""Difficulty scores as a result: of which kind, whose, how sure, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unsharp import artifacts
from unsharp.difficulty.kinds import Kind, ScoreKind, kind_named
from unsharp.errors import UserError, listed

KIND, ID, POSITION, ERROR, LABELS, PROVENANCE = "kind", "id", "index", "standard_error", "labels", "provenance"
SUFFIXES = (".npz", ".csv", ".parquet")
SCORES_FILE = "scores.npz"
"""What the scores are called in the directory of a run."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores:
    """The difficulty of samples.

    Args:
        kind: "memorization", "cscore", or the name of a proxy.
        raw: (n,) float64, finite, as the kind defines them, whichever way it points.
        ids: (n,) int64 or str, the samples' ids.
        positions: (n,) int64, their positions in the full source.
        standard_error: (n,) float64 of `raw`; None where nothing was repeated. An entry is NaN where it is not known.
        labels: (n,) int64, the labels under which they were scored; None where nobody knows.
        extras: Further scores of the same samples that came with these, by kind, each (n,) float64.
        provenance: Settings, seeds, data, cost and versions as plain values; empty where nobody knows.

    Raises:
        UserError: if the kind is unknown, or a score is not finite.
    """

    kind: ScoreKind
    raw: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    standard_error: np.ndarray | None = None
    labels: np.ndarray | None = None
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind_named(self.kind)
        bad = self.ids[~np.isfinite(self.raw)].tolist()
        if bad:
            raise UserError(
                f"scores: {len(bad)} samples have a NaN or infinite score, ids {listed(bad)}; mend the file"
            )

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def about(self) -> Kind:
        """What is known of the kind."""
        return kind_named(self.kind)

    @property
    def direction(self) -> str:
        """Which way the raw scores point, in words."""
        return "higher is harder" if self.about.higher_is_harder else "lower is harder"

    @property
    def difficulty(self) -> np.ndarray:
        """(n,) float64, higher is harder: the raw scores, or these negated."""
        return self.raw if self.about.higher_is_harder else -self.raw

    def save(self, path: str | Path) -> None:
        """Write them to a `.npz`, `.csv` or `.parquet` file, whole or not at all, so that `load_scores` reads them.

        The raw scores stand in a column called like the kind, which also stands in the column `kind`.

        Raises:
            UserError: if the file's name ends in something else, or it cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"scores are written to files that end in {', '.join(SUFFIXES)}, got {str(path)!r}")
        write = {".npz": self._write_npz, ".csv": self._write_csv, ".parquet": self._write_parquet}[path.suffix.lower()]
        with artifacts.writing(path), artifacts.atomic(path) as temporary:
            write(temporary)

    def _columns(self) -> dict[str, np.ndarray]:
        found = {ID: self.ids, POSITION: self.positions, self.kind: self.raw}
        if self.standard_error is not None:
            found[ERROR] = self.standard_error
        if self.labels is not None:
            found[LABELS] = self.labels
        return found | dict(self.extras)

    def _write_npz(self, path: Path) -> None:
        about = {KIND: self.kind, "direction": self.direction, PROVENANCE: json.dumps(dict(self.provenance))}
        arrays = self._columns() | {name: np.array(text) for name, text in about.items()}
        if any(array.dtype.hasobject for array in arrays.values()):
            raise UserError("scores: ids must be integers or text")
        with open(path, "wb") as file:  # with a name of its own, NumPy would add an ending
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]

    def _write_csv(self, path: Path) -> None:
        import csv

        columns = {KIND: np.full(len(self), self.kind)} | self._columns()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*(column.tolist() for column in columns.values())))

    def _write_parquet(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({KIND: np.full(len(self), self.kind)} | self._columns())
        about = {"direction": self.direction, PROVENANCE: json.dumps(dict(self.provenance))}
        pq.write_table(table.replace_schema_metadata(about), path)
