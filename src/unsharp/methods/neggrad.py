"""NegGrad: descend on what is retained and ascend on what is forgotten, in one loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsharp.methods.base import METHODS, PhasedMethod, Problem, check_fraction
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Phase


@METHODS.register("neggrad")
@dataclass(frozen=True, kw_only=True)
class NegGrad(PhasedMethod):
    """Descend on retain and ascend on forget in one loss; under a rule, sharpness is that of the signed sum.

    Args:
        alpha: Weight α in [0, 1] of the retain loss; the forget loss has weight −(1−α).
    """

    source: ClassVar[str] = "Kurmanji et al., NeurIPS 2023 (NegGrad+); Tang & Khanna, ICLR 2026 (arXiv 2506.13715)"
    formula: ClassVar[str] = "L = α·mean over retain of CE − (1−α)·mean over forget of CE"

    alpha: float = 0.99

    def __post_init__(self) -> None:
        check_fraction("alpha", self.alpha)

    def phases(self, problem: Problem) -> list[Phase]:
        objective = CrossEntropy({RETAIN: self.alpha, FORGET: -(1 - self.alpha)})
        return [Phase(objective=objective, rule=problem.rule, name="neggrad")]
