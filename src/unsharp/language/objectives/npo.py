"""Negative preference optimisation: gradient difference that slows down where an answer has become unlikely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsharp.language.likelihood import Reduction, answer_losses
from unsharp.language.objectives.base import (
    OBJECTIVES,
    LanguageObjective,
    SampleLoss,
    Task,
    at,
    check_positive,
    check_reduction,
    negative_log_sigmoid,
)


@OBJECTIVES.register("npo")
@dataclass(frozen=True, kw_only=True)
class NegativePreference(LanguageObjective):
    """Negative preference optimisation (NPO): each forgotten answer is to become less likely than it was at first.

    The sigmoid is taken of each sample, never of a batch's mean, so that the result depends on no batch size.

    Args:
        beta: Inverse temperature β > 0; as β → 0 it becomes gradient difference.
        reduction: NLL of a forgotten answer is the "sum" of its tokens', as in the paper, or their "mean", as in the
            published code of Unlearn-Smooth, whose β are for that.
    """

    source: ClassVar[str] = "Zhang et al., COLM 2024, eq. 3 (arXiv 2404.05868)"
    formula: ClassVar[str] = (
        "L = mean over samples of −(2/β)·log σ(β·(NLL_θ(forget) − NLL_before(forget))) + γ·NLL(retain)"
    )

    beta: float = 0.1
    reduction: Reduction = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        check_reduction(self.reduction)

    def forget_loss(self, task: Task) -> SampleLoss:
        before = task.reference(self.reduction)
        return lambda model, batch: (
            negative_log_sigmoid(self.beta * (answer_losses(model, batch, self.reduction) - at(before, batch)))
            * (2 / self.beta)
        )
