"""Sharp MinMax beside NegGrad under three rules, with the published averages."""

from __future__ import annotations

from unsharp.recipes.paper.base import Reproduction, register
from unsharp.recipes.paper.variants import (
    AVERAGE,
    GAPS,
    PUBLISHED_UNKNOWN,
    RULES,
    SETTINGS_UNKNOWN,
    SIGNED,
    TOW,
    best,
    method,
    published_averages,
    sharp_minmax,
)

NEGGRADS = tuple(method("NegGrad", rule) for rule in RULES)
FULL = sharp_minmax()

register(
    "sharp-minmax",
    Reproduction(
        title="Sharp MinMax beside NegGrad",
        shows="Sharp MinMax is said to be the best method on average over the three difficulties (C2).",
        figures=(TOW, SIGNED, *GAPS),
        compared=(*NEGGRADS, FULL),
        baseline="NegGrad",
        claims=best(FULL, NEGGRADS),
        published=published_averages(
            {"NegGrad": 81.80, "NegGrad, SAM 0.1": 72.78, "NegGrad, ASAM 1.0": 83.11, FULL.name: 87.90}, AVERAGE
        ),
        unknown=(*SETTINGS_UNKNOWN, *PUBLISHED_UNKNOWN),
    ),
)
