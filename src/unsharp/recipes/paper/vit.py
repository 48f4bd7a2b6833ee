"""A vision transformer in place of a convolutional network: ViT-S with patches of 4 pixels."""

from __future__ import annotations

import dataclasses

from unsharp.models import ModelConfig
from unsharp.recipes.paper.adamw import slower, under_adamw
from unsharp.recipes.paper.base import Reproduction, register
from unsharp.recipes.paper.problems import Problem
from unsharp.recipes.paper.variants import GAPS, RULES, TOW, method, sharp_minmax, sharper

NAMES = ("NegGrad", "SalUn")
SHAPES = {
    "smoke": ModelConfig(arch="vit_small", width=24, options={"patch": 4, "depth": 2, "heads": 2}),
    "small": ModelConfig(arch="vit_small", width=96, options={"patch": 4, "depth": 6, "heads": 3}),
    "paper": ModelConfig(arch="vit_small", options={"patch": 4}),
}


def _transformer(problem: Problem) -> Problem:
    return dataclasses.replace(under_adamw(problem), model=SHAPES[problem.size])


register(
    "vit",
    Reproduction(
        title="ViT-S/4 on CIFAR-100",
        shows="The gain by SAM is said to carry over to a vision transformer (C10).",
        figures=(TOW, *GAPS),
        compared=tuple(map(slower, (*(method(name, rule) for name in NAMES for rule in RULES), sharp_minmax()))),
        claims=sharper(NAMES, "C10", "on a transformer, {method} does better with {rule} than without"),
        adapt=_transformer,
        unknown=(
            "Rates and decay of the transformer: those of `adamw` stand here.",
            "The published code adds RandAugment for the transformer; crops and flips stand for it here.",
        ),
    ),
)
