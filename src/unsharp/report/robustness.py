"""Accuracy on corrupted inputs as a figure: by severity, a plot for each set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unsharp.report.figures import COLOURS, DASHES, INK, MARKERS, as_svg, canvas, room
from unsharp.surroundings.findings import RETRAINED


def curves(found: Mapping[str, Any]) -> str:
    """The mean accuracy over the corruptions at each severity (0: clean), and the single ones in pale, as SVG.

    Args:
        found: What `Robustness.measure` gives.
    """
    networks = list(found["networks"])
    with canvas(3.0, len(found["sets"]), sharey=True) as (figure, axes):
        for ax, (on, one) in zip(axes, found["sets"].items()):
            severities = sorted({int(s) for rows in one["corrupted"].values() for s in rows})
            for i, network in enumerate(networks):
                colour, dash = (INK, (0, (4, 2))) if network == RETRAINED else (COLOURS[i % len(COLOURS)], DASHES[0])
                each = np.array([[rows[str(s)][network] for s in severities] for rows in one["corrupted"].values()])
                start = one["clean"][network]
                for row in each:
                    ax.plot([0, *severities], [start, *row], color=colour, linewidth=0.6, alpha=0.3)
                ax.plot(
                    [0, *severities], [start, *each.mean(axis=0)], color=colour, linestyle=dash,
                    marker=MARKERS[i % len(MARKERS)], markersize=4, label=network,
                )  # fmt: skip
            ax.set_title(f"{on} ({one['n']} samples)", loc="left")
            ax.set_xlabel("severity (0: clean)")
            ax.set_xticks([0, *severities])
        axes[0].set_ylabel("accuracy (%)")
        axes[0].set_ylim(room(axes[0].get_ylim(), percent=True))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(networks))
        return as_svg(figure)
