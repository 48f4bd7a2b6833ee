"""ROC curves as a figure: logarithmic axes, where attacks differ, and linear ones beside them, where the area lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unsharp.errors import UserError
from unsharp.evaluation.roc import Roc
from unsharp.report.figures import COLOURS, DASHES, INK, MUTED, as_svg, canvas

LARGEST_FLOOR = 1e-2
"""A logarithmic axis shows at least the rates from here to 1."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve of the figure.

    Args:
        title: What the legend calls it.
        roc: The curve.
        reference: Whether it is the attack on the retrained network, which is drawn apart.
    """

    title: str
    roc: Roc
    reference: bool = False


def roc_curves(curves: Sequence[Curve]) -> str:
    """The curves as SVG, the same bytes for the same curves.

    On the logarithmic axes a curve is the rate that `Roc.at` gives: no point is interpolated. Below the smallest
    false-positive rate that its scores can tell it is dotted: there it holds what was found without a false positive.

    Args:
        curves: At least one.

    Raises:
        UserError: if there is none.
    """
    if not curves:
        raise UserError("there is no curve to draw; give at least one")
    from matplotlib.ticker import FuncFormatter, NullLocator

    floor = lowest(curves)
    with canvas(3.9 + 0.19 * math.ceil(len(curves) / 2), 2, sharey=False) as (figure, (log, linear)):
        chance = np.geomspace(floor, 1, 50)
        log.plot(chance, chance, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
        linear.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
        for i, curve in enumerate(curves):
            colour, dash = (INK, (0, (4, 2))) if curve.reference else (COLOURS[i % len(COLOURS)], DASHES[0])
            fpr, tpr = staircase(curve.roc)
            drawn = np.maximum(tpr, floor / 10)  # a rate of 0 lies below the axis
            label = f"{curve.title} (area {curve.roc.auc:.3f})"
            log.plot(fpr, drawn, color=colour, linestyle=dash, drawstyle="steps-post", label=label, zorder=3)
            none = max(float(curve.roc.tpr[curve.roc.false_positives == 0].max()), floor / 10)
            log.plot([floor, fpr[0]], [none, none], color=colour, linestyle=(0, (1, 1.2)), linewidth=1.2, zorder=3)
            linear.plot(curve.roc.fpr, curve.roc.tpr, color=colour, linestyle=dash, zorder=3)
        for ax, start in ((log, floor), (linear, 0.0)):
            ax.set_xlabel("false-positive rate")
            ax.set_xlim(start, 1.0)
            ax.set_ylim(start, 1.0)
        log.set_xscale("log")
        log.set_yscale("log")
        log.set_title("True-positive rate (log)", loc="left")
        linear.set_title("True-positive rate", loc="left")
        for axis in (log.xaxis, log.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g} %"))
            axis.set_minor_locator(NullLocator())
        handles, labels = log.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        return as_svg(figure)


def staircase(roc: Roc) -> tuple[np.ndarray, np.ndarray]:
    """The distinct false-positive rates above 0, ascending, and the highest true-positive rate at each."""
    last = np.flatnonzero(np.diff(roc.false_positives, append=roc.n_others + 1))
    last = last[roc.false_positives[last] > 0]
    return roc.fpr[last], roc.tpr[last]


def lowest(curves: Sequence[Curve]) -> float:
    """Where the logarithmic axes begin: at the power of ten below the smallest rate that a curve can tell."""
    smallest = min(curve.roc.smallest_fpr for curve in curves)
    return min(LARGEST_FLOOR, 10.0 ** math.floor(math.log10(smallest) + 1e-9))
