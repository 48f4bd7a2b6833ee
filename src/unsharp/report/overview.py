"""All evaluated runs below a directory on one page, from their index: a table that sorts, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from unsharp.index import FIGURES, WITH_GAP, Index
from unsharp.report.groups import _short
from unsharp.report.page import page
from unsharp.report.plain import bars, latex, latex_comment, tabular

HEADS = {
    "retain_accuracy": "Retain (%)",
    "forget_accuracy": "Forget (%)",
    "test_accuracy": "Test (%)",
    "tow": "ToW (%)",
    "seconds": "Time (s)",
}
ABOUT = (
    "Mean over the seeds of one setting ± half-width of its 95 % t interval, where there are several; it covers the "
    "variation between seeds alone."
)
BRACKETS = "In brackets: the gap, value minus the retrained network's."
FIELDS = ("mean", "low", "high", "half_width")


def records(index: Index) -> list[dict[str, Any]]:
    """A row for each group of runs that differ in the seed alone: task, label, seeds, figures with intervals."""
    labels, members = _labels(index), index.evaluated()
    rows = []
    for name, runs in members.items():
        task = index.groups[name]["task"]
        row: dict[str, Any] = {"task": f"{task['rule']}; {task['subject']}", "label": labels[name], "n": len(runs)}
        rows.append(row | {"seeds": " ".join(str(run["seed"]) for run in runs)})
    for kind, ending, figures in (("figures", "", FIGURES), ("gaps", "_gap", WITH_GAP)):
        for figure in figures:
            intervals = mean_intervals([[run[kind].get(figure) for run in runs] for runs in members.values()])
            for row, found in zip(rows, intervals):
                row |= {f"{figure}{ending}_{part}": value for part, value in zip(FIELDS, found)}
    return rows


def mean_intervals(groups: Sequence[Sequence[float | None]]) -> list[tuple[float | None, ...]]:
    """Mean, low, high and half-width of each group, as of `stats.mean_interval`; of those of one size at once.

    A group in which a value is missing has no figure, and one of a single value no interval.
    """
    found: list[tuple[float | None, ...]] = [(None,) * len(FIELDS)] * len(groups)
    sizes: dict[int, list[int]] = {}
    for i, values in enumerate(groups):
        if values and None not in values:
            sizes.setdefault(len(values), []).append(i)
    for n, rows in sizes.items():
        values = np.array([groups[i] for i in rows], dtype=np.float64)
        means, half = values.mean(axis=1), np.zeros(len(rows))
        if n > 1:
            half = stdtrit(n - 1, 0.975) * values.std(axis=1, ddof=1) / math.sqrt(n)
        for i, mean, width in zip(rows, means.tolist(), half.tolist()):
            found[i] = (mean, mean - width, mean + width, width) if n > 1 else (mean, None, None, None)
    return found


def render(index: Index, *, title: str) -> str:
    """The page as text."""
    rows = records(index)
    evaluated = sum(row["n"] for row in rows)
    return page(
        "overview.html",
        title=title,
        sortable=True,
        headline=f"{_counted(evaluated, 'evaluated network')} in {_counted(len(rows), 'setting')}.",
        heads=list(HEADS.values()),
        rows=[_line(row) for row in rows],
    )


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `records` as a Markdown table, each figure with its interval and gap."""
    return bars(*_texts(rows)) + f"\n\n{ABOUT} {BRACKETS}\n"


def to_latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """Likewise as LaTeX (package booktabs)."""
    heads, lines = _texts(rows)
    cells = [[latex(text) for text in line] for line in lines]
    return tabular("Evaluated networks", heads, cells) + "\n\n" + latex_comment(f"{ABOUT} {BRACKETS}") + "\n"


def _texts(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines as text."""
    lines = []
    for row in rows:
        cells = [f"{c['mean']}{c['half']}" + (f" ({c['gap']})" if c["gap"] else "") for c in _line(row)["cells"]]
        lines.append([row["label"], row["task"], str(row["n"]), *cells])
    return ["Network", "Task", "n", *HEADS.values()], lines


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = []
    for figure in FIGURES:
        mean, half = row[f"{figure}_mean"], row[f"{figure}_half_width"]
        gap, gap_half = row.get(f"{figure}_gap_mean"), row.get(f"{figure}_gap_half_width")
        cells.append(
            {
                "raw": None if mean is None else repr(mean),
                "mean": _text(mean) or "—",
                "half": _half(half),
                "gap": _text(gap, signed=True) + _half(gap_half),
            }
        )
    return {"label": row["label"], "task": row["task"], "n": row["n"], "cells": cells}


def _text(value: float | None, *, signed: bool = False) -> str:
    return "" if value is None else f"{value:{'+' if signed else ''}.2f}".replace("-", "−")


def _half(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2f}"


def _labels(index: Index) -> dict[str, str]:
    """What each group is called: method and rule, and the settings in which those of one name differ."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, group in index.groups.items():
        alike.setdefault((group["task_key"], group["title"]), []).append(name)
    found = {}
    for (_, title), names in alike.items():
        differing = _differing([index.groups[name]["settings"] for name in names])
        for name in names:
            own = index.groups[name]["settings"]
            found[name] = " · ".join([title, *(f"{_short(key)}={own.get(key, '–')}" for key in differing)])
    return found


def _differing(settings: Iterable[dict[str, str]]) -> list[str]:
    """Keys whose values are not the same in all of the settings."""
    values: dict[str, set[str | None]] = {}
    many = list(settings)
    for key in dict.fromkeys(key for one in many for key in one):
        values[key] = {one.get(key) for one in many}
    return [key for key, seen in values.items() if len(seen) > 1]
