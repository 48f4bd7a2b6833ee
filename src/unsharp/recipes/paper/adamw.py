"""AdamW as the base optimiser of training and unlearning."""

from __future__ import annotations

import dataclasses

from unsharp.recipes.paper.base import Compared, Reproduction, register
from unsharp.recipes.paper.problems import Problem
from unsharp.recipes.paper.variants import GAPS, RULES, TOW, method, sharp_minmax, sharper

PRETRAINED = {"lr": 1e-3, "weight_decay": 0.05}
NAMES = ("Fine-tuning", "NegGrad", "SalUn")


def under_adamw(problem: Problem) -> Problem:
    """The same problem, trained and unlearned by AdamW."""
    return dataclasses.replace(
        problem,
        train=dict(problem.train) | {"optimizer": {"name": "adamw", **PRETRAINED}},
        loop=dict(problem.loop) | {"optimizer": "adamw"},
    )


def slower(compared: Compared) -> Compared:
    """The same variant with the steps that suit AdamW."""
    rates = {"lr": [3e-4, 1e-3, 3e-3]} if "lr" in compared.choose else {}
    return dataclasses.replace(
        compared, paper=dict(compared.paper) | {"lr": 1e-3}, choose=dict(compared.choose) | rates
    )


register(
    "adamw",
    Reproduction(
        title="Unlearning under AdamW",
        shows="The gain by SAM is said to carry over to AdamW (C10).",
        figures=(TOW, *GAPS),
        compared=tuple(map(slower, (*(method(name, rule) for name in NAMES for rule in RULES), sharp_minmax()))),
        claims=sharper(NAMES, "C10", "under AdamW, {method} does better with {rule} than without"),
        adapt=under_adamw,
        unknown=(
            "The rates and the decay of the paper's AdamW: 0.001 stands here, with a decay of 0.05 in training. The "
            "published code has 0.01 by default, for whichever optimiser.",
            "A phase's weight cancels in AdamW's step where each phase has an optimiser of its own; see the pitfalls.",
        ),
    ),
)
