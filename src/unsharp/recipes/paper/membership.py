"""Membership inference after unlearning: the paper's five attacks, each beside the retrained network."""

from __future__ import annotations

from unsharp.recipes.paper.base import Figure, Reproduction, register
from unsharp.recipes.paper.variants import RULES, TOW, method, sharp_minmax, sharper

ATTACKS = tuple(
    f"svc_{feature}" for feature in ("confidence", "correctness", "entropy", "modified_entropy", "probability")
)
NAMES = ("Fine-tuning", "NegGrad", "SalUn")

register(
    "membership",
    Reproduction(
        title="Membership inference by support vector machines",
        shows="Forgotten samples are said to be told from unseen ones less often under SAM (C3).",
        figures=(
            TOW,
            *(
                Figure(
                    title=f"share judged non-member, {attack.removeprefix('svc_').replace('_', ' ')}: gap",
                    column=f"gap.mia.{attack}",
                    better="nearer zero",
                )
                for attack in ATTACKS
            ),
        ),
        compared=(*(method(name, rule) for name in NAMES for rule in RULES), sharp_minmax()),
        claims=sharper(
            NAMES,
            "C3",
            "the confidence attack judges {method} under {rule} more like retraining than under SGD",
            "gap.mia.svc_confidence",
        ),
        attacks=ATTACKS,
        unknown=("How the paper averages the five attacks, if it does.",),
    ),
)
