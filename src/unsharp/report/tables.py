"""What was found as one typed table, and its forms: Markdown, terminal text, CSV, JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unsharp.evaluation.metrics import ATTACKS, METRICS
from unsharp.report import details as behind
from unsharp.report.groups import Group, group
from unsharp.report.plain import bars
from unsharp.stats import Interval, mean_interval

ACCURACY, MEMBERSHIP, STRENGTH, LOSS, COST = "Accuracy", "Membership inference", "Attack accuracy", "Loss", "Cost"
NETWORK = "Network"
SPLITS = ("retain", "forget", "test")
LABELS = {"original": "before unlearning", "retrained": "never saw the forget set", "unlearned": ""}
REASONS = {
    "peak_memory_bytes": "memory stayed below an earlier peak of the process, so that no peak can be told",
    "original": "the training of the original is not part of these runs",
    "reference": "there is no retrained model to compare with",
}


@dataclass(frozen=True)
class Column:
    """One figure of each row.

    Args:
        key: Where it stands in the metrics, levels joined by dots; unique.
        title: Heading.
        unit: "%", "nats", "s", "", "bytes".
        section: Under which heading it is shown.
        with_gap: Whether the difference to the retrained model is shown with it.
    """

    key: str
    title: str
    unit: str
    section: str
    with_gap: bool = False


@dataclass(frozen=True)
class Cell:
    """A figure over seeds; without a value, `reason` says why."""

    value: Interval | None
    gap: Interval | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Row:
    """The figures of one group of networks, by column key."""

    group: Group
    cells: dict[str, Cell]

    @property
    def n(self) -> int:
        """How many networks the row is about."""
        return len(self.group.values)


@dataclass(frozen=True)
class Table:
    """All figures of a report; the caption says what the intervals cover."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str

    def section(self, name: str) -> list[Column]:
        """The columns under one heading."""
        return [column for column in self.columns if column.section == name]

    def of_kind(self, *kinds: str) -> list[Row]:
        """The rows of some kinds."""
        return [row for row in self.rows if row.group.kind in kinds]

    def beside(self, row: Row, kind: str) -> Row | None:
        """The original's or the retrained reference's row of the same task."""
        return next((r for r in self.rows if r.group.kind == kind and r.group.task == row.group.task), None)


@dataclass(frozen=True)
class Grid:
    """A table as it is printed: headings, and for each line its heading, a remark and cells with their columns."""

    title: str
    corner: str
    heads: list[str]
    lines: list[tuple[str, str, list[tuple[Column, Cell]]]]

    @property
    def down(self) -> bool:
        """Whether its figures go down, a line each, and the networks across."""
        return self.corner != NETWORK


def summarise(runs: Sequence[Mapping[str, Any]]) -> Table:
    """All figures of some unlearned networks, over seeds.

    Args:
        runs: Each `stages.about()` with the `evaluate_network()` values under "metrics".

    Returns:
        A row for each task's original, retrained reference, and method with its settings.

    Raises:
        UserError: if a figure is not finite.
    """
    groups = group(runs)
    columns = _columns([values for g in groups for values in g.values])
    rows = tuple(Row(g, {c.key: _cell(g, c) for c in columns}) for g in groups)
    return Table(columns, rows, _caption(rows))


def grids(table: Table) -> list[Grid]:
    """The table in readable pieces; attacks and details, of which there are many, go down instead of across."""
    found = []
    for name in (ACCURACY, COST, LOSS):
        columns = table.section(name)
        if columns:
            heads = [c.title + (f" ({c.unit})" if c.unit in ("s", "nats") else "") for c in columns]
            lines = [(r.group.title, _remark(r), [(c, r.cells[c.key]) for c in columns]) for r in table.rows]
            found.append(Grid(name, NETWORK, ["n", *heads], lines))
    down = [_down(table, MEMBERSHIP, "Attack"), *(_down(table, name, "Figure") for name in behind.SECTIONS)]
    return [*found[:1], *filter(None, down[:1]), *found[1:], *filter(None, down[1:])]


def _down(table: Table, name: str, corner: str) -> Grid | None:
    """The figures under a heading, a line each; None where there are none."""
    lines = [(c.title, "", [(c, r.cells[c.key]) for r in table.rows]) for c in table.section(name)]
    return Grid(name, corner, [r.group.title for r in table.rows], lines) if lines else None


def to_markdown(table: Table, *, pieces: Collection[str] | None = None) -> str:
    """The table as Markdown: a piece for each heading, then the caption and footnotes.

    Args:
        table: The table.
        pieces: Titles of the pieces to show, such as `ACCURACY` and `COST`; all by default.
    """
    notes: list[str] = []
    parts = []
    for grid in grids(table):
        if pieces is not None and grid.title not in pieces:
            continue
        heads, lines = _texts(table, grid, notes)
        parts.append(f"**{grid.title}**\n\n{bars(heads, lines)}")
    return "\n\n".join([*parts, *_below(table, notes)]) + "\n"


def to_text(
    table: Table, *, pieces: Collection[str] | None = None, width: int | None = None, colour: bool = False
) -> str:
    """The table for a terminal.

    Args:
        table: The table.
        pieces: Titles of the pieces to show, such as `ACCURACY` and `COST`; all by default.
        width: Columns of the terminal; None asks it, and takes 120 where there is none.
        colour: Whether to emit colours.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    width = width or shutil.get_terminal_size((120, 24)).columns
    console = Console(file=io.StringIO(), width=width, force_terminal=colour, highlight=False)
    notes: list[str] = []
    for grid in grids(table):
        if pieces is not None and grid.title not in pieces:
            continue
        heads, lines = _texts(table, grid, notes)
        shown = RichTable(title=Text(grid.title), title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
        for i, head in enumerate(heads):
            shown.add_column(Text(head), justify="right" if i else "left")
        for line in lines:
            # With intervals a cell is long, and would else be broken within its brackets.
            shown.add_row(*(Text(text.replace(" (", "\n(") if "±" in text else text) for text in line))
        console.print(shown)
    for text in _below(table, notes):
        console.print(Text(text, style="dim"))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def records(table: Table) -> list[dict[str, Any]]:
    """The table as rows of one figure each; what is missing is None, with its reason."""
    fields = ("mean", "low", "high", "half_width")
    found = []
    for row in table.rows:
        of = row.group
        about = {"task": of.task.name, "label": of.label, "kind": of.kind, "n": row.n}
        about["seeds"] = " ".join(map(str, of.seeds))
        for column in table.columns:
            cell = row.cells[column.key]
            numbers = {f: getattr(cell.value, f, None) for f in fields}
            gaps = {f"gap_{f}": getattr(cell.gap, f, None) for f in fields}
            found.append(about | {"metric": column.key, "unit": column.unit} | numbers | gaps | {"reason": cell.reason})
    return found


def to_csv(table: Table) -> str:
    """The table as CSV, a line for each row and figure; what is missing stays empty, with its reason."""
    text, rows = io.StringIO(), records(table)
    writer = csv.DictWriter(text, rows[0] if rows else ["task"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_json(table: Table) -> str:
    """The table as JSON: columns, rows with their cells by column key, and the caption."""
    rows = [
        {
            "label": row.group.label,
            "kind": row.group.kind,
            "task": dataclasses.asdict(row.group.task),
            "n": row.n,
            "seeds": list(row.group.seeds),
            "values": {key: dataclasses.asdict(cell) for key, cell in row.cells.items()},
        }
        for row in table.rows
    ]
    content = {"caption": table.caption, "columns": [dataclasses.asdict(c) for c in table.columns], "rows": rows}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# --- numbers as text --------------------------------------------------------------------------------------------------


def number(interval: Interval, unit: str, *, signed: bool = False) -> str:
    """A mean with the half-width of its interval: "96.3 ± 0.4"."""
    show = _shower(interval.mean, unit)
    mean = show(interval.mean)
    if signed and not mean.startswith("−"):
        mean = f"+{mean}"
    return mean if interval.half_width is None else f"{mean} ± {show(interval.half_width)}"


def _shower(typical: float, unit: str) -> Callable[[float], str]:
    if unit == "bytes":
        power, name = (30, "GiB") if abs(typical) >= 2**30 else (20, "MiB")
        return lambda x: f"{x / 2**power:,.{1 if power == 30 else 0}f} {name}"
    size = abs(typical)
    decimals = {"%": 1, "points": 1, "classes": 1, "nats": 3, "score": 3, "": 0}.get(
        unit, 0 if size >= 100 else 1 if size >= 10 else 2
    )
    return lambda x: _minus(f"{x:,.{decimals}f}")


def _minus(text: str) -> str:
    zero = not text.strip("-0.,")
    return text.replace("-", "" if zero else "−")


def footnote(reason: str | None, notes: list[str]) -> int:
    """The number of a footnote, which joins `notes` where it is new."""
    text = reason or "not known"
    if text not in notes:
        notes.append(text)
    return notes.index(text) + 1


def _texts(table: Table, grid: Grid, notes: list[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of a grid as text."""
    counts = None if grid.down else [str(r.n) for r in table.rows]
    lines = []
    for i, (head, _, cells) in enumerate(grid.lines):
        texts = [_text(column, cell, notes) for column, cell in cells]
        lines.append([head, *([] if counts is None else [counts[i]]), *texts])
    return [grid.corner, *grid.heads], lines


def _text(column: Column, cell: Cell, notes: list[str]) -> str:
    if cell.value is None:
        return f"— [{footnote(cell.reason, notes)}]"
    gap = "" if cell.gap is None else f" ({number(cell.gap, column.unit, signed=True)})"
    return number(cell.value, column.unit) + gap


def _below(table: Table, notes: Sequence[str]) -> list[str]:
    """What stands under the tables: caption, how to read the brackets, how good the attacks are, footnotes."""
    brackets = "In brackets: the gap, value minus the retrained model's."
    numbered = [f"[{i}] {note}." for i, note in enumerate(notes, 1)]
    return [f"{table.caption} {brackets}", *filter(None, [strength(table)]), *numbered]


def strength(table: Table) -> str | None:
    """How well the attacks tell members from others, in a sentence; None where none was run."""
    cells = [row.cells[c.key].value for row in table.rows for c in table.section(STRENGTH)]
    means = [value.mean for value in cells if value is not None]
    if not means:
        return None
    ends = " to ".join(dict.fromkeys(f"{x:.1f}" for x in (min(means), max(means))))
    return (
        f"The attacks tell retained from test samples with a balanced accuracy of {ends} % (50 % is guessing); the "
        "weaker an attack, the less its figure says."
    )


# --- columns and cells ------------------------------------------------------------------------------------------------


def _columns(values: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    attacks = dict.fromkeys(name for v in values for name in v.get(ATTACKS, {}))
    columns = [Column(f"{s}_accuracy", s.capitalize(), "%", ACCURACY, with_gap=True) for s in SPLITS]
    columns += [Column("tow", "ToW", "%", ACCURACY), Column("tow_signed", "ToW (signed)", "%", ACCURACY)]
    for name in attacks:
        title = METRICS[name].title.removeprefix("MIA, ") if name in METRICS else name
        title = title[:1].upper() + title[1:]
        columns.append(Column(f"{ATTACKS}.{name}.mia", title, "%", MEMBERSHIP, with_gap=True))
        columns.append(Column(f"{ATTACKS}.{name}.attack_accuracy", f"{title}: accuracy", "%", STRENGTH, with_gap=True))
    columns += [Column(f"{s}_loss", s.capitalize(), "nats", LOSS, with_gap=True) for s in SPLITS]
    columns += [
        Column("seconds", "Time", "s", COST),
        Column("seconds_share", "Time, share of retraining", "%", COST),
        Column("passes", "Passes", "", COST),
        Column("passes_share", "Passes, share of retraining", "%", COST),
        Column("peak_memory_bytes", "Peak memory", "bytes", COST),
    ]
    # What no network has, as older runs or those without a retrained network, would be a table of dashes.
    known = [d for d in behind.details() if any(_at(v, d.key) is not None for v in values)]
    return (*columns, *(Column(d.key, d.title, d.unit, d.section, d.with_gap) for d in known))


def _cell(of: Group, column: Column) -> Cell:
    if column.key.endswith("_share"):
        return _share(of, column.key.removesuffix("_share"))
    found = [_at(values, column.key) for values in of.values]
    if any(v is None for v in found):
        return Cell(None, reason=_reason(of, column.key, found))
    gaps = [_at(g or {}, column.key) for g in of.gaps]
    known = column.with_gap and all(g is not None for g in gaps)
    return Cell(mean_interval(found), mean_interval(gaps) if known else None)


def _share(of: Group, key: str) -> Cell:
    """Cost as a share of the retrained model's, in percent, seed by seed."""
    against = [run["metrics"].get("reference") or {} for run in of.runs]
    found = [100.0 * v[key] / r[key] if v.get(key) and r.get(key) else None for v, r in zip(of.values, against)]
    known = [share for share in found if share is not None]
    if len(known) < len(found):
        return Cell(None, reason=REASONS["original" if of.kind == "original" else "reference"])
    return Cell(mean_interval(known))


def _at(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for level in key.split("."):
        found = found.get(level) if isinstance(found, Mapping) else None
    return found


def _reason(of: Group, key: str, found: Sequence[Any]) -> str:
    missing = [i for i, v in enumerate(found) if v is None]
    parts = key.split(".")
    name = parts[min(1, len(parts) - 1)]
    why = of.runs[missing[0]]["metrics"].get("reasons", {}).get(name)
    if why is None and of.kind == "original" and key in ("seconds", "passes", "peak_memory_bytes"):
        why = REASONS["original"]
    why = why or (REASONS | behind.REASONS).get(key, "not measured")
    return why if len(missing) == len(found) else f"missing in {len(missing)} of {len(found)} runs: {why}"


def _remark(row: Row) -> str:
    return LABELS[row.group.kind]


def _caption(rows: Sequence[Row]) -> str:
    counts = sorted({row.n for row in rows})
    if not counts or counts == [1]:
        return "Single runs, so no interval can be given."
    many = ", ".join(str(n) for n in counts if n > 1)
    once = " A row with n = 1 has no interval." if 1 in counts else ""
    return (
        f"Mean over n = {many} runs ± half-width of its 95 % t interval; it covers the variation between the runs "
        f"given, taken as independent and roughly normal, and nothing that was the same in all of them.{once}"
    )
