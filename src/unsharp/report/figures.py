"""The figures as SVG: the same bytes for the same table, told apart by shape as well as colour."""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from unsharp.report.tables import MEMBERSHIP, SPLITS, STRENGTH, Cell, Column, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2a30", "#66747c", "#d8dee0"
COLOURS = ("#0072b2", "#d55e00", "#008f6b", "#b5548e", "#9a7500", "#3d8fc4")  # after Okabe & Ito, darkened for print
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
WIDTH = 7.6
_WANTED: ContextVar[tuple[tuple[str, list[bytes]], ...]] = ContextVar("_WANTED", default=())
"""Forms in which figures are kept besides, each with the list that takes them."""
STYLE: Any = {
    "svg.hashsalt": "unsharp",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 6.0,
}


def accuracies(table: Table) -> str | None:
    """Accuracy on retain, forget and test for each network, with the retrained model's as a line; None without runs."""
    rows = table.of_kind("original", "unlearned")
    splits = [s for s in SPLITS if any(r.cells[f"{s}_accuracy"].value for r in rows)]
    if not rows or not splits:
        return None
    with canvas(1.0 + 0.3 * len(rows), len(splits), sharey=True) as (figure, axes):
        for ax, split in zip(axes, splits):
            key = f"{split}_accuracy"
            for y, row in enumerate(rows):
                reference = table.beside(row, "retrained")
                _reference_tick(ax, y, None if reference is None else reference.cells[key])
                _point(ax, row.cells[key], y, _look(table, row))
            ax.set_title(f"{split.capitalize()} accuracy", loc="left")
            ax.set_xlabel("%")
            ax.set_xlim(room(ax.get_xlim(), percent=True))
        _name_rows(axes[0], [_name(row) for row in rows])
        return as_svg(figure)


def _name(row: Row, most: int = 60) -> str:
    """What a row is called in a figure: a long name leaves no room for the marks, and stands whole in the tables."""
    title = row.group.title
    return title if len(title) <= most else f"{title[: most - 1]}…"


def gaps(table: Table) -> str | None:
    """Gap to the retrained model in each accuracy, in points; None where there is nothing to compare with."""
    columns = [c for c in table.columns if c.key in {f"{s}_accuracy" for s in SPLITS}]
    return _by_metric(
        table, [(c, c.title) for c in columns], "gap", "points above (+) or below (−) the retrained model"
    )


def membership(table: Table) -> str | None:
    """What each attack says of the forget set, beside what it says of the retrained model; None without attacks."""
    columns = table.section(MEMBERSHIP)
    strengths = dict(zip((c.key for c in columns), table.section(STRENGTH)))
    labels = []
    for column in columns:
        found = [row.cells[strengths[column.key].key].value for row in table.rows]
        means = [value.mean for value in found if value is not None]
        ends = dict.fromkeys(f"{x:.0f}" for x in (min(means), max(means))) if means else ()
        labels.append((column, column.title + (f"\nits accuracy {'–'.join(ends)} %" if means else "")))
    return _by_metric(table, labels, "value", "% of the forget set called non-member")


def curves(table: Table) -> str | None:
    """Accuracy on retain and forget samples while unlearning, mean over seeds; None without a history."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in table.of_kind("unlearned") if _history(row, "forget_accuracy") is not None]
    if not rows:
        return None
    with canvas(2.9 + _legend_height(rows), 2, sharey=False) as (figure, axes):
        for ax, split in zip(axes, ("retain", "forget")):
            key = f"{split}_accuracy"
            for row in rows:
                found = _history(row, key)
                if found is not None:
                    colour, marker, dash = _look(table, row)
                    every = max(1, len(found[0]) // 12)
                    ax.plot(*found, color=colour, marker=marker, markersize=4, linestyle=dash, markevery=every)
            for row in table.of_kind("retrained"):
                value = row.cells[key].value
                if value is not None:
                    ax.axhline(value.mean, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
            ax.set_title(f"{split.capitalize()} accuracy while unlearning (%)", loc="left")
            ax.set_xlabel("epoch")
            ax.set_ylim(room(ax.get_ylim(), percent=True))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, table, rows, reference=bool(table.of_kind("retrained")), line=True)
        return as_svg(figure)


def cost(table: Table) -> str | None:
    """ToW against wall time, the retrained model included; None where either is unknown everywhere."""
    rows = [r for r in table.of_kind("unlearned", "retrained") if r.cells["tow"].value and r.cells["seconds"].value]
    if not any(row.group.kind == "unlearned" for row in rows):
        return None
    shown = [row for row in rows if row.group.kind == "unlearned"]
    with canvas(2.8 + _legend_height(shown), 1, sharey=False) as (figure, (ax,)):
        for row in rows:
            seconds, tow = row.cells["seconds"].value, row.cells["tow"].value
            assert seconds is not None
            assert tow is not None
            colour, marker, _ = _look(table, row)
            ax.errorbar(
                seconds.mean, tow.mean, yerr=tow.half_width, xerr=_within(seconds), color=colour, marker=marker,
                markersize=7, elinewidth=1.0, linestyle="none",
            )  # fmt: skip
        ax.set_xscale("log")
        ax.margins(y=0.15)
        _plain_log(ax)
        ax.set_xlabel("seconds (logarithmic)")
        ax.set_title("ToW (100 = as retrained)", loc="left")
        ax.set_ylim(room(ax.get_ylim(), percent=True))
        _legend(figure, table, shown, reference=True)
        return as_svg(figure)


FIGURES = {"accuracies": accuracies, "gaps": gaps, "membership": membership, "curves": curves, "cost": cost}

# --- parts ------------------------------------------------------------------------------------------------------------

Look = tuple[str, str, Any]


def _look(table: Table, row: Row) -> Look:
    """Colour, marker and dash of a row, the same in every figure."""
    if row.group.kind == "retrained":
        return INK, "*", "-"
    if row.group.kind == "original":
        return MUTED, "h", "-"
    i = next(i for i, r in enumerate(table.of_kind("unlearned")) if r is row)
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)]


def _by_metric(table: Table, columns: Sequence[tuple[Column, str]], what: str, label: str) -> str | None:
    """A line for each metric, on it a mark for each network, and the retrained model's as a bar."""
    rows = table.of_kind("original", "unlearned")
    columns = [(c, t) for c, t in columns if any(getattr(r.cells[c.key], what) for r in rows)]
    if not rows or not columns:
        return None
    step = max(0.4, 0.13 * len(rows))
    with canvas(0.8 + step * len(columns) + _legend_height(rows), 1, sharey=False) as (figure, (ax,)):
        for y, (column, _) in enumerate(columns):
            for i, row in enumerate(rows):
                offset = 0.66 * ((i + 0.5) / len(rows) - 0.5)
                cell = row.cells[column.key]
                _point(ax, Cell(getattr(cell, what)), y + offset, _look(table, row), size=5)
                reference = table.beside(row, "retrained")
                if what == "value" and reference is not None:
                    _reference_tick(ax, y + offset, reference.cells[column.key], 0.33 / len(rows))
        if what == "gap":
            ax.axvline(0.0, color=INK, linewidth=1.2, zorder=1)
        for y in range(1, len(columns)):
            ax.axhline(y - 0.5, color=GRID, linewidth=0.7)
        _name_rows(ax, [title for _, title in columns])
        ax.set_xlabel(label)
        ax.set_xlim(room(ax.get_xlim(), percent=what == "value"))
        _legend(figure, table, rows, reference=bool(table.of_kind("retrained")))
        return as_svg(figure)


def _point(ax: Axes, cell: Cell, y: float, look: Look, size: float = 6.5) -> None:
    if cell.value is None:
        return
    colour, marker, _ = look
    ax.errorbar(
        cell.value.mean, y, xerr=cell.value.half_width, color=colour, marker=marker, markersize=size,
        elinewidth=1.1, linestyle="none", zorder=3,
    )  # fmt: skip


def _reference_tick(ax: Axes, y: float, cell: Cell | None, half: float = 0.5) -> None:
    if cell is not None and cell.value is not None:
        ax.plot([cell.value.mean] * 2, [y - half, y + half], color=INK, linewidth=1.4, zorder=2, solid_capstyle="butt")


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)


def room(limits: tuple[float, float], *, percent: bool) -> tuple[float, float]:
    """Keep an axis of nearly equal values from pretending that they are far apart, and percentages within 0 to 100."""
    low, high = limits
    if high - low < 4.0:
        low, high = (low + high) / 2 - 2.0, (low + high) / 2 + 2.0
    return (max(low, -2.0), min(high, 102.0)) if percent else (low, high)


def _plain_log(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_xlim()
    if high / low < 4:
        middle = math.sqrt(low * high)
        low, high = middle / 2, middle * 2
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _within(interval: Any) -> list[list[float]] | None:
    """The interval's arms, the lower one kept above zero, where a logarithmic axis ends."""
    half = interval.half_width
    return None if half is None else [[min(half, 0.9 * interval.mean)], [half]]


def _history(row: Row, key: str) -> tuple[list[float], list[float]] | None:
    """Epochs and mean over seeds, as far as all seeds go; from before the first epoch where the original is known."""
    series = []
    for run in row.group.runs:
        values = [r[key] for r in run.get("history") or [] if key in r]
        series.append(values)
    length = min((len(values) for values in series), default=0)
    if length == 0:
        return None
    means = np.mean([values[:length] for values in series], axis=0).tolist()
    before = [_of_original(run, key) for run in row.group.runs]
    known = [value for value in before if value is not None]
    start = [float(np.mean(known))] if len(known) == len(before) else []
    return list(range(1 - len(start), length + 1)), start + means


def _of_original(run: Mapping[str, Any], key: str) -> float | None:
    return (run["metrics"].get("original") or {}).get(key)


def _legend_height(rows: Sequence[Row]) -> float:
    return 0.19 * math.ceil((len(rows) + 1) / _columns(rows)) + 0.1


def _columns(rows: Sequence[Row]) -> int:
    longest = max((len(_name(row)) for row in rows), default=1)
    return max(1, min(4, 105 // (longest + 8)))


def _legend(figure: Figure, table: Table, rows: Sequence[Row], *, reference: bool, line: bool = False) -> None:
    from matplotlib.lines import Line2D

    handles = []
    if reference:
        star = not line and any(ax.get_xscale() == "log" for ax in figure.axes)
        look: dict[str, Any] = {"marker": "*", "linestyle": "none"} if star else {"marker": "|", "markeredgewidth": 1.6}
        look = {"linestyle": (0, (4, 2))} if line else {"linestyle": "none", **look}
        handles.append(Line2D([], [], color=INK, markersize=9, label="Retrained", **look))
    for row in rows:
        colour, marker, dash = _look(table, row)
        style = dash if line else "none"
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle=style, label=_name(row)))
    figure.legend(handles=handles, loc="outside upper left", ncols=_columns(rows), handletextpad=0.5, columnspacing=1.6)


@contextlib.contextmanager
def canvas(height: float, n: int, *, sharey: bool) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `height` inches with `n` plots beside each other, in the style of all reports."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks is drawn by the reader's font
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(1, n, sharey=sharey, squeeze=False)
        yield figure, list(axes[0])
        for form, kept in _WANTED.get():
            kept.append(_saved(figure, form))


@contextlib.contextmanager
def kept_as(form: str) -> Iterator[list[bytes]]:
    """Within it, every figure that is drawn is kept in another form too, in the order of drawing.

    Args:
        form: "svg", "pdf", or "png", of 200 dots per inch.
    """
    kept: list[bytes] = []
    before = _WANTED.set((*_WANTED.get(), (form, kept)))
    try:
        yield kept
    finally:
        _WANTED.reset(before)


def _saved(figure: Figure, form: str) -> bytes:
    """The figure by itself, on white, without dates."""
    import matplotlib

    made, about = io.BytesIO(), {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[form]
    # A file that stands alone brings its letters along.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(made, format=form, dpi=200, metadata=about)
    return made.getvalue()


def as_svg(figure: Figure) -> str:
    """The figure, without the date and the links of matplotlib's own header."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :]
