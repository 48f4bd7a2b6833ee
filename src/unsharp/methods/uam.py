"""UAM: learn the retained samples at the place where the forget samples would be forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from unsharp.methods.base import METHODS, PhasedMethod, Problem
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Phase
from unsharp.sharpness.base import RULES
from unsharp.sharpness.perturbation import PerturbedGradient


@METHODS.register("uam")
@dataclass(frozen=True, kw_only=True)
class UnlearningAwareMinimization(PhasedMethod):
    """Step with the retain gradient at weights that are moved up the forget loss, by the radius of the rule.

    With L_R and L_F the mean losses on a batch of each: min over w of L_R(w+ε), ε the maximiser of L_F(w+ε) in ‖ε‖ ≤ ρ.
    The gradient of a forget sample never enters the update; it only says where the retain gradient is taken.
    """

    source: ClassVar[str] = (
        "Kim et al., NeurIPS 2025 (Unlearning-Aware Minimization), from its abstract and its published code"
    )
    formula: ClassVar[str] = "ε = ρ·T²·∇L_F(w)/‖T·∇L_F(w)‖₂;  step with g₀ + s·λ·(∇L_R(w+ε) − g₀), g₀ = ∇L_R(w)"
    default_rule: ClassVar[str] = "sam"
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"rho": (0.1, 0.3, 1.0, 3.0)}

    @classmethod
    def admits(cls, rule: str) -> tuple[bool, str]:
        kind = RULES[rule]
        if issubclass(kind, PerturbedGradient) and kind.perturbs_by_another:
            return True, ""
        if rule == "none":
            return False, "without a perturbation it is finetune"
        return False, "its perturbation must be able to follow the gradient of another loss; take sam or asam"

    def phases(self, problem: Problem) -> list[Phase]:
        return [
            Phase(
                objective=CrossEntropy({RETAIN: 1.0}),
                perturb_objective=CrossEntropy({FORGET: 1.0}),
                rule=problem.rule,
                name=RETAIN,
            )
        ]
