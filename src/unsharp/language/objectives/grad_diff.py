"""Gradient difference: up the loss of what is to be forgotten, down that of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsharp.language.likelihood import Reduction, answer_losses
from unsharp.language.objectives.base import OBJECTIVES, LanguageObjective, SampleLoss, Task, check_reduction


@OBJECTIVES.register("grad_diff")
@dataclass(frozen=True, kw_only=True)
class GradientDifference(LanguageObjective):
    """Gradient difference: the forgotten answers' likelihood is lowered without a bound.

    Args:
        reduction: The loss of a forgotten answer is the "mean" or the "sum" of its tokens'.
    """

    source: ClassVar[str] = (
        "Liu, Liu & Stone, CoLLAs 2022 (arXiv 2203.12817); for language: Maini et al. (TOFU), COLM 2024"
    )
    formula: ClassVar[str] = "L = −NLL(forget) + γ·NLL(retain)"

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reduction(self.reduction)

    def forget_loss(self, task: Task) -> SampleLoss:
        return lambda model, batch: -answer_losses(model, batch, self.reduction)
