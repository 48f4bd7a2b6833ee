"""Feature entanglement of retain and forget after unlearning, by variance and by Wasserstein distance."""

from __future__ import annotations

from unsharp.recipes.paper.base import Figure, Reproduction, register
from unsharp.recipes.paper.variants import RULES, TOW, method, sharp_minmax, sharper

NAMES = ("NegGrad", "SalUn")
WASSERSTEIN = "entanglement.wasserstein_1.entanglement"
VARIANCE = "entanglement.variance_entanglement.ratio"

register(
    "entanglement",
    Reproduction(
        title="Entanglement of retain and forget in the penultimate features",
        shows="SAM is said to leave retain and forget features less entangled (C4).",
        figures=(
            TOW,
            Figure(title="variance entanglement", column=VARIANCE, better="lower", digits=2),
            Figure(title="Wasserstein entanglement", column=WASSERSTEIN, better="lower", digits=3),
        ),
        compared=(*(method(name, rule) for name in NAMES for rule in RULES), sharp_minmax()),
        pretraining=RULES,
        claims=sharper(NAMES, "C4", "{method} leaves less entangled features under {rule} than under SGD", WASSERSTEIN),
        features=True,
        unknown=("The published code divides the variance ratio by 1300 and clips it; here it is as it is.",),
    ),
)
