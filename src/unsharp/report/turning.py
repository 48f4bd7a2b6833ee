"""Loss surfaces as bodies that the reader turns: their heights, colours and ticks, for `turn.js` to draw."""

from __future__ import annotations

from typing import Any

import numpy as np

from unsharp.evaluation.landscape import Surfaces
from unsharp.report.landscape import level_colours, levels_of, place_on, short


def scenes(surfaces: Surfaces, on: str) -> dict[str, Any]:
    """What `turn.js` draws of a set: the surface of each network, all on the scale of levels that `contours` has.

    Args:
        surfaces: What `Landscape.measure` gives.
        on: Name of the set.

    Returns:
        "axis" (A,) places on both axes; "bands", from the lowest the colour of each level; "ticks", pairs of a height
        and the loss there; "networks", for each (A, A) "heights" in [0, 1] and "losses" as text, rows along the second
        direction. A height is None where the loss is not finite, and within [0, 1] where it is outside of the scale.

    Raises:
        UserError: if there is no such set, or no loss on it is finite.
    """
    levels = levels_of(surfaces, on)
    steps = len(levels) - 1
    return {
        "axis": surfaces.axis.tolist(),
        "bands": level_colours(levels),
        "ticks": [[i / steps, short(float(levels[i]))] for i in range(0, steps + 1, 3)],
        "networks": [_body(surfaces.surface(name, on).T, levels) for name in surfaces.networks],
    }


def _body(loss: np.ndarray, levels: np.ndarray) -> dict[str, Any]:
    heights = np.round(place_on(levels, loss), 4)
    return {
        "heights": [[None if np.isnan(h) else h for h in row] for row in heights.tolist()],
        "losses": [[short(value) for value in row] for row in loss.tolist()],
    }
