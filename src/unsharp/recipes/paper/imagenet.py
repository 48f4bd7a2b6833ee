"""ImageNet: NegGrad under three rules and Sharp MinMax on 5 % of the weights, with the published averages."""

from __future__ import annotations

from unsharp.recipes.paper.base import Reproduction, register
from unsharp.recipes.paper.variants import (
    GAPS,
    PUBLISHED_UNKNOWN,
    RULES,
    SIGNED,
    TOW,
    best,
    method,
    published_averages,
    sharp_minmax,
)

FULL = sharp_minmax(fraction=0.05)
NEGGRADS = tuple(method("NegGrad", rule) for rule in RULES)
AVERAGE = "ImageNet, average over high, mid and low"

register(
    "imagenet",
    Reproduction(
        title="ImageNet",
        shows="Sharp MinMax is said to be the best method on ImageNet too (C2).",
        figures=(TOW, SIGNED, *GAPS),
        compared=(*NEGGRADS, FULL),
        task="imagenet",
        baseline="NegGrad",
        claims=best(FULL, NEGGRADS),
        published=published_averages(
            {"NegGrad": 83.83, "NegGrad, SAM 0.1": 83.68, "NegGrad, ASAM 1.0": 84.84, FULL.name: 87.90}, AVERAGE
        ),
        unknown=(
            "Epochs, batches, rate and decay on ImageNet, and the size of the forget sets: 90 epochs and 3,000 samples "
            "stand here, and the others are those of CIFAR.",
            *PUBLISHED_UNKNOWN,
        ),
    ),
)
