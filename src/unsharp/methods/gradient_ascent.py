"""Gradient ascent on what is to be forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from unsharp.methods.base import METHODS, PhasedMethod, Problem
from unsharp.phases import FORGET, CrossEntropy, Phase


@METHODS.register("gradient_ascent")
@dataclass(frozen=True, kw_only=True)
class GradientAscent(PhasedMethod):
    """Raise the loss of the forget samples, with nothing that holds the rest in place."""

    source: ClassVar[str] = "Graves et al., AAAI 2021; Thudi et al., EuroS&P 2022 (arXiv 2109.13398)"
    formula: ClassVar[str] = "L = − mean over forget of CE"
    suggested: ClassVar[dict[str, Any]] = {"epochs": 3, "lr": 1e-3}
    tunable: ClassVar[dict[str, Any]] = {"lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "epochs": (1, 2, 3, 4, 5)}
    no_retain_fraction: ClassVar[str] = "it reads no retained sample"

    def phases(self, problem: Problem) -> list[Phase]:
        return [Phase(objective=CrossEntropy({FORGET: -1.0}), rule=problem.rule, name=FORGET)]
