"""Relearning as a figure: the forget accuracy of attacked networks by epoch, beside that of the retrained one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from unsharp import stats
from unsharp.errors import UserError
from unsharp.report.figures import COLOURS, DASHES, INK, MARKERS, as_svg, canvas, room

Curves = Mapping[str, Sequence[Sequence[float]]]
"""By network, a curve for each seed: forget accuracy (0–100) before the attack and after each epoch."""


def relearning_curves(panels: Mapping[str, Curves], reference: str) -> str:
    """The curves as SVG, a panel beside the other, the same bytes for the same curves.

    A line is the mean over the seeds; the band around it is the 95 % t interval, where there are several.

    Args:
        panels: By title, at least one; networks of the same name look alike in all.
        reference: Name of the retrained network, which is drawn apart.

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
                epochs = np.arange(len(mean))
                ax.plot(epochs, mean, color=colour, linestyle=dash, marker=marker, markersize=4, label=name)
                if half is not None:
                    ax.fill_between(epochs, mean - half, mean + half, color=colour, alpha=0.13, linewidth=0)
            ax.set_title(title, loc="left")
            ax.set_xlabel("epoch of the attack")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].set_ylabel("forget accuracy (%)")
        axes[0].set_ylim(room(axes[0].get_ylim(), percent=True))
        found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
        figure.legend([found[name] for name in names], names, loc="outside upper left", ncols=columns)
        return as_svg(figure)


def _means(seeds: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean and half width of the interval at each epoch; no width for a single seed."""
    found = [stats.mean_interval(values) for values in zip(*seeds, strict=True)]
    mean, half = np.array([one.mean for one in found]), [one.half_width for one in found]
    return mean, None if half[0] is None else np.array(half, float)


__all__ = ["Curves", "relearning_curves"]
