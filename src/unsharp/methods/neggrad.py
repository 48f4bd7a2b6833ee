"""NegGrad: descend on what is retained and ascend on what is forgotten, in one loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from unsharp.errors import unknown
from unsharp.methods.base import METHODS, PhasedMethod, Problem, alpha_cancels, check_fraction
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Phase
from unsharp.sharpness.base import NO_RULE

SHARPNESS_ON = ("joint", "retain", "separate", "unsigned")


@METHODS.register("neggrad")
@dataclass(frozen=True, kw_only=True)
class NegGrad(PhasedMethod):
    """Descend on retain and ascend on forget; under a rule, sharpness is that of the part that you choose.

    With L_R and L_F the two mean losses, ε_L the rule's perturbation for a loss L, and L₋ = α·L_R − (1−α)·L_F:
    "joint" steps with ∇L₋(w+ε) for ε of L₋, as the published code does; "retain" with α·∇L_R(w+ε_R) − (1−α)·∇L_F(w);
    "separate" gives both terms their own ε; "unsigned" takes ε from α·L_R + (1−α)·L_F, the reading under which the
    theory of the paper holds.

    Args:
        alpha: Weight α in [0, 1] of the retain loss; the forget loss has weight −(1−α).
        sharpness_on: Whose sharpness the rule acts on: joint, retain, separate or unsigned.
    """

    source: ClassVar[str] = "Kurmanji et al., NeurIPS 2023 (NegGrad+); Tang & Khanna, ICLR 2026 (arXiv 2506.13715)"
    formula: ClassVar[str] = "L = α·mean over retain of CE − (1−α)·mean over forget of CE"
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"alpha": (0.8, 0.9, 0.95, 0.98, 0.99)}

    alpha: float = 0.99
    sharpness_on: Literal["joint", "retain", "separate", "unsigned"] = "joint"

    def __post_init__(self) -> None:
        check_fraction("alpha", self.alpha)
        if self.sharpness_on not in SHARPNESS_ON:
            raise unknown("sharpness_on", self.sharpness_on, SHARPNESS_ON)

    def phases(self, problem: Problem) -> list[Phase]:
        retain, forget = self.alpha, -(1 - self.alpha)
        if self.sharpness_on in ("retain", "separate"):
            rule = NO_RULE if self.sharpness_on == "retain" else problem.rule
            return [
                Phase(objective=CrossEntropy({RETAIN: retain}), rule=problem.rule, name=RETAIN),
                Phase(objective=CrossEntropy({FORGET: forget}), rule=rule, name=FORGET),
            ]
        unsigned = CrossEntropy({RETAIN: retain, FORGET: -forget}) if self.sharpness_on == "unsigned" else None
        objective = CrossEntropy({RETAIN: retain, FORGET: forget})
        return [Phase(objective=objective, perturb_objective=unsigned, rule=problem.rule, name="neggrad")]

    def cautions(self, *, scale_free: bool, apart: bool) -> list[str]:
        two = self.sharpness_on in ("retain", "separate")
        return alpha_cancels(self.alpha) if scale_free and apart and two else []
