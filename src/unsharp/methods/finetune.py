"""Fine-tuning on what is retained: forgetting by neglect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsharp.methods.base import METHODS, PhasedMethod, Problem
from unsharp.phases import RETAIN, CrossEntropy, Phase


@METHODS.register("finetune")
@dataclass(frozen=True, kw_only=True)
class Finetune(PhasedMethod):
    """Train on with the retained samples alone."""

    source: ClassVar[str] = "Warnecke et al., NDSS 2023; Golatkar et al., CVPR 2020 (baseline)"
    formula: ClassVar[str] = "L = mean over retain of CE"

    def phases(self, problem: Problem) -> list[Phase]:
        return [Phase(objective=CrossEntropy({RETAIN: 1.0}), rule=problem.rule, name=RETAIN)]
