"""SimNPO: NPO without a reference, on the mean loss of an answer's tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from unsharp.errors import UserError
from unsharp.language.likelihood import answer_losses
from unsharp.language.objectives.base import (
    OBJECTIVES,
    LanguageObjective,
    SampleLoss,
    Task,
    check_positive,
    negative_log_sigmoid,
)


@OBJECTIVES.register("simnpo")
@dataclass(frozen=True, kw_only=True)
class SimpleNegativePreference(LanguageObjective):
    """SimNPO: each forgotten answer is to become unlikely, whatever its length and however likely it was.

    Args:
        beta: Inverse temperature β > 0.
        margin: Mean loss δ of a token up to which a forgotten answer counts as well known.
    """

    source: ClassVar[str] = "Fan et al., NeurIPS 2025 (arXiv 2410.07163)"
    formula: ClassVar[str] = (
        "L = mean over samples of −(2/β)·log σ(β·(NLL_θ(forget)/|y| − δ)) + γ·NLL(retain), |y| tokens in the answer"
    )

    beta: float = 2.5
    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        if not math.isfinite(self.margin):
            raise UserError(f"margin must be a finite number, got {self.margin!r}")

    def forget_loss(self, task: Task) -> SampleLoss:
        return lambda model, batch: (
            negative_log_sigmoid(self.beta * (answer_losses(model, batch, "mean") - self.margin)) * (2 / self.beta)
        )
