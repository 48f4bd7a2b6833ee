"""One offline page about an estimate of memorization: how the scores lie, how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unsharp import artifacts
from unsharp.report import figures
from unsharp.report.html import inline
from unsharp.report.page import markup, page

if TYPE_CHECKING:
    from unsharp.difficulty.memorization import Estimate

PAGE = "memorization.html"
TITLE = "Memorization"
LIMITS = (
    "A score belongs to the training procedure: this architecture, this length of training, this size of the subsets. "
    "Another procedure memorizes other samples, if largely the same.",
    "Two halves of the networks agree less than two pools of the full size would, so the agreement understates. It "
    "says whether a set is settled, not whether it is the right one.",
    "Samples of equal score are many at the easy end. Which of them make up a low set is a matter of their ids; "
    "the agreement is taken with ties in random order.",
    "The standard error counts the networks, not the choice of the training procedure.",
)


def write_memorization(path: str | Path, summary: Mapping[str, Any], scores: Estimate) -> None:
    """Write the page. Raises: UserError if it cannot be written.

    Args:
        path: The file.
        summary: What `memorize` writes as memorization.json.
        scores: The estimate.
    """
    artifacts.write_text(path, render_memorization(summary, scores))


def render_memorization(summary: Mapping[str, Any], scores: Estimate) -> str:
    """The page as text; the same bytes for the same values. Args: as `write_memorization`."""
    return page(
        PAGE,
        title=TITLE,
        headline=_headline(summary),
        tiles=_tiles(summary),
        spread=markup(inline(histogram(scores), "spread")),
        growth=markup(inline(course(summary), "growth")),
        heads=["Networks", "Rank correlation", *(f"Overlap, {level}" for level in summary["watched"]), "Minutes"],
        lines=[_line(row, list(summary["watched"])) for row in summary["rounds"]],
        pool=summary["pool"],
        versions=summary["versions"],
        limits=LIMITS,
    )


def histogram(scores: Estimate) -> str:
    """How the scores lie, and how their standard errors do, as SVG."""
    from matplotlib.ticker import FuncFormatter

    known = scores.memorization[np.isfinite(scores.memorization)]
    errors = scores.standard_error[np.isfinite(scores.memorization)]
    with figures.canvas(2.7, 2, sharey=False) as (figure, (left, right)):
        left.hist(known, bins=np.linspace(-1, 1, 81).tolist(), color=figures.COLOURS[0], log=True)
        left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        left.set_xlim(min(-0.25, float(known.min(initial=0.0))), 1.02)
        left.set_xlabel("memorization score")
        left.set_title("Samples (log scale)", loc="left")
        order = np.linspace(0, len(known) - 1, min(len(known), 3000)).astype(int)
        right.plot(known[order], errors[order], ".", markersize=2.5, color=figures.COLOURS[1], rasterized=True)
        right.set_xlabel("memorization score")
        right.set_title("Standard error", loc="left")
        right.set_ylim(bottom=0)
        return figures.as_svg(figure)


def course(summary: Mapping[str, Any]) -> str:
    """Agreement between two halves of the networks as the pool grew, as SVG."""
    rows = [row for row in summary["rounds"] if row["spearman"] is not None]
    with figures.canvas(2.7, 1, sharey=False) as (figure, (ax,)):
        for i, name in enumerate(["spearman", *summary["watched"]]):
            label = "rank correlation" if name == "spearman" else f"overlap of the {name} set"
            colour, marker = figures.COLOURS[i % len(figures.COLOURS)], figures.MARKERS[i % len(figures.MARKERS)]
            values = [row[name] if row[name] is not None else math.nan for row in rows]
            dash = figures.DASHES[i % len(figures.DASHES)]
            ax.plot([row["models"] for row in rows], values, color=colour, marker=marker, linestyle=dash, label=label)
        ax.set_xlabel("networks (the halves have half as many)")
        ax.set_title("Agreement between halves", loc="left")
        ax.set_ylim(0, 1.02)
        figure.legend(loc="outside upper left", ncols=3)
        return figures.as_svg(figure)


def _headline(summary: Mapping[str, Any]) -> str:
    n, known = summary["memorized"], summary["samples"] - summary["unknown"]
    return (
        f"{n:,} of {known:,} training samples ({100 * n / max(1, known):.1f} %) have a score of at least 0.25: "
        "networks that had them are right on them so much more often than networks that had not. "
        f"{summary['memorized_for_sure']:,} of them stand above it by two standard errors."
    )


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    last = summary["rounds"][-1]
    size = f"{summary['pool']['subset']:,}"
    tiles = [(f"{summary['models']:,}", f"networks, each trained on {size} samples")]
    if summary["mean_standard_error"] is not None:
        tiles.append((f"{summary['mean_standard_error']:.3f}", "mean standard error of a score"))
    for level, n in summary["watched"].items():
        if last[level] is not None:
            tiles.append((f"{100 * last[level]:.0f} %", f"of the {level} set of {n:,} is the same in both halves"))
    tiles.append(("yes" if summary["settled"] else "no", "settled, as far as was asked for"))
    if summary["unknown"]:
        tiles.append((f"{summary['unknown']:,}", "samples without a score: all networks had them, or none"))
    return tiles


def _line(row: Mapping[str, Any], levels: list[str]) -> dict[str, Any]:
    shown = [_share(row["spearman"], 2), *(_share(row[level], 2) for level in levels), f"{row['minutes']:.1f}"]
    return {"head": f"{row['models']:,}", "cells": shown}


def _share(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
