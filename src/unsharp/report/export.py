"""A table of results as a file: CSV, Parquet, LaTeX, Markdown or JSON, by its ending; each with its intervals."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unsharp import artifacts
from unsharp.errors import UserError
from unsharp.report.plain import latex, latex_comment, tabular
from unsharp.report.tables import Table, footnote, grids, number, records, to_csv, to_json, to_markdown
from unsharp.stats import Interval


def to_latex(table: Table) -> str:
    """The table as LaTeX (packages booktabs), a tabular for each piece; every cell with its interval and gap."""
    notes: list[str] = []
    parts = []
    for grid in grids(table):
        heads = [grid.corner, *grid.heads]
        lines = []
        for i, (head, _, cells) in enumerate(grid.lines):
            counts = [] if grid.down else [str(table.rows[i].n)]
            shown = [_cell(column.unit, cell.value, cell.gap, cell.reason, notes) for column, cell in cells]
            lines.append([latex(head), *counts, *shown])
        parts.append(tabular(grid.title, heads, lines))
    below = [table.caption, "In brackets: the gap, value minus the retrained model's."]
    below += [f"[{i}] {note}." for i, note in enumerate(notes, 1)]
    return "\n\n".join([*parts, "\n".join(map(latex_comment, below))]) + "\n"


def to_parquet(table: Table) -> bytes:
    """The table as Parquet: the rows of the CSV, with types."""
    import pandas as pd

    buffer = io.BytesIO()
    pd.DataFrame(records(table)).to_parquet(buffer, index=False)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[Table], Any]] = {
    ".csv": to_csv,
    ".json": to_json,
    ".md": to_markdown,
    ".parquet": to_parquet,
    ".tex": to_latex,
}


def check_table_file(path: str | Path) -> None:
    """Raise UserError for a file whose ending names no form of a table."""
    if Path(path).suffix.lower() not in WRITERS:
        raise UserError(f"table file {path} must end in one of {', '.join(WRITERS)}, which says its form")


def write_table(path: str | Path, table: Table) -> None:
    """Write a table in the form that the file's ending names. Raises: UserError for another one, or no permission."""
    check_table_file(path)
    content = WRITERS[Path(path).suffix.lower()](table)
    with artifacts.writing(path, "--table"), artifacts.atomic(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def _cell(unit: str, value: Interval | None, gap: Interval | None, reason: str | None, notes: list[str]) -> str:
    if value is None:
        return rf"---\textsuperscript{{{footnote(reason, notes)}}}"
    shown = number(value, unit) + ("" if gap is None else f" ({number(gap, unit, signed=True)})")
    return latex(shown)
