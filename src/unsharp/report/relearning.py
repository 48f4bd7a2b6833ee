"""Relearning as a figure: what attacked networks get back, point by point, beside what the retrained one does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unsharp import artifacts, stats
from unsharp.errors import UserError
from unsharp.report.figures import COLOURS, DASHES, INK, MARKERS, as_svg, canvas, room
from unsharp.report.html import inline
from unsharp.report.page import markup, page

Curves = Mapping[str, Sequence[Sequence[float]]]
"""By network, a curve for each seed: the figure before the attack and at each point after."""
PAGE, TITLE = "relearning.html", "Relearning"
WHERE = ("epoch", "step", "passes", "model", "seed")
"""Columns of a row that say where it belongs and measure nothing."""
LIMITS = (
    "What comes back beyond what the retrained model gains is evidence that the forgotten was still held. Nothing "
    "coming back under one attack is no evidence that it was not: another rate or more steps may bring it back.",
    "A model that starts low has more room to gain than one that starts high; hence the gain of the retrained model "
    "beside it, and the whole curve.",
    "The seeds here are those of the attack: of what it is fine-tuned on, and in which order. They say nothing of "
    "other runs of the unlearning.",
)


def relearning_curves(
    panels: Mapping[str, Curves],
    reference: str,
    *,
    x: str = "epoch of the attack",
    y: str = "forget accuracy (%)",
    places: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """The curves as SVG, a panel beside the other, the same bytes for the same curves.

    A line is the mean over the seeds; the band around it is the 95 % t interval, where there are several.

    Args:
        panels: By title, at least one; networks of the same name look alike in all.
        reference: Name of the retrained network, which is drawn apart.
        x: What the points are.
        y: What the figure is; accuracy in per cent if nothing else is said.
        places: By title, where on the axis the points lie; 0, 1, 2, ... if left out.

    Raises:
        UserError: if there is no panel, or one without a network.
    """
    from matplotlib.ticker import MaxNLocator

    if not panels or not all(panels.values()):
        raise UserError("there is no curve to draw; give at least one network in each panel")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    others = [name for name in names if name != reference]
    columns = max(1, min(4, 105 // (max(map(len, names)) + 8)))
    with canvas(2.7 + 0.19 * math.ceil(len(names) / columns), len(panels), sharey=True) as (figure, axes):
        for ax, (title, curves) in zip(axes, panels.items()):
            for name, seeds in curves.items():
                i = others.index(name) if name in others else -1
                colour, dash = (INK, (0, (4, 2))) if i < 0 else (COLOURS[i % len(COLOURS)], DASHES[0])
                marker = "" if i < 0 else MARKERS[i % len(MARKERS)]
                mean, half = _means(seeds)
                at = np.arange(len(mean)) if places is None else np.asarray(places[title], float)
                ax.plot(at, mean, color=colour, linestyle=dash, marker=marker, markersize=4, label=name)
                if half is not None:
                    ax.fill_between(at, mean - half, mean + half, color=colour, alpha=0.13, linewidth=0)
            ax.set_title(title, loc="left")
            ax.set_xlabel(x)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].set_ylabel(y)
        axes[0].set_ylim(room(axes[0].get_ylim(), percent=y.endswith("(%)")))
        found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
        figure.legend([found[name] for name in names], names, loc="outside upper left", ncols=columns)
        return as_svg(figure)


def _means(seeds: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean and half width of the interval at each epoch; no width for a single seed."""
    found = [stats.mean_interval(values) for values in zip(*seeds, strict=True)]
    mean, half = np.array([one.mean for one in found]), [one.half_width for one in found]
    return mean, None if half[0] is None else np.array(half, float)


def write_relearning(
    path: str | Path, found: Mapping[str, Any], curves: str, sentences: Sequence[str], *, reference: str
) -> None:
    """Write one offline page: what came back in words, the curves, and a table for each attack.

    Args:
        path: The file.
        found: By attack, "config" and "rows", as `attack_all` gives them.
        curves: The figure as SVG.
        sentences: What came back.
        reference: Name of the retrained network, which need not be among those that were attacked.

    Raises:
        UserError: if it cannot be written.
    """
    text = page(
        PAGE,
        title=TITLE,
        sentences=sentences,
        curves=markup(inline(curves, "curves")),
        reference=any(row["model"] == reference for one in found.values() for row in one["rows"]),
        tables=[_table(on, one) for on, one in found.items()],
        limits=LIMITS,
    )
    artifacts.write_text(path, text)


def _table(on: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """First and last row of each model, the mean over the seeds."""
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    first, last = (pick(row["epoch"] for row in rows) for pick in (min, max))
    columns = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in WHERE]
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        ends = [[row for row in rows if row["model"] == model and row["epoch"] == end] for end in (first, last)]
        cells = [" → ".join(_mean([row[name] for row in some if name in row]) for some in ends) for name in columns]
        lines.append({"head": model, "cells": cells})
    return {
        "id": on,
        "title": f"Fine-tuned on {found['config']['n']} of: {on}",
        "seeds": len({row["seed"] for row in rows}),
        "heads": ["Model", *(name.replace("_", " ") for name in columns)],
        "lines": lines,
    }


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3g}" if values else "–"


__all__ = ["Curves", "relearning_curves", "write_relearning"]
