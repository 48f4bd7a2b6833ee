"""How small α may be: NegGrad under SGD, SAM and ASAM over a range of the retain weight."""

from __future__ import annotations

from unsharp.recipes.paper.base import Claim, Compared, Reproduction, register
from unsharp.recipes.paper.variants import GAPS, RULES, TOW

ALPHAS = (0.99, 0.97, 0.95, 0.9, 0.8)


def _at(alpha: float, rule: str) -> Compared:
    how = RULES[rule]
    return Compared(
        name=f"{rule}, α {alpha}",
        method="neggrad",
        rule=how["name"],
        fixed={"alpha": alpha} | {key: value for key, value in how.items() if key != "name"},
        paper={"lr": 0.01},
        choose={"lr": [0.03, 0.1]},
    )


register(
    "alpha",
    Reproduction(
        title="NegGrad with ever smaller α",
        shows="SAM is said to tolerate a smaller weight of the retain loss than SGD does (C6).",
        figures=(TOW, *GAPS),
        compared=tuple(_at(alpha, rule) for rule in RULES for alpha in ALPHAS),
        claims=tuple(
            Claim(
                claim="C6",
                says=f"at α = {alpha} the retain accuracy under {rule} is nearer to retraining than under SGD",
                better={"variant": f"{rule}, α {alpha}"},
                worse={"variant": f"SGD, α {alpha}"},
                figure="gap.retain_accuracy",
            )
            for rule in RULES
            if rule != "SGD"
            for alpha in ALPHAS
        ),
        unknown=("Which values of α the paper sweeps; its code has 0.99 by default.",),
    ),
)
