"""Retraining without the forget set: the reference that every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from unsharp.errors import UserError
from unsharp.methods.base import METHODS, AppliedMethod, Problem

if TYPE_CHECKING:
    from unsharp.training import Record


@METHODS.register("retrain")
@dataclass(frozen=True, kw_only=True)
class Retrain(AppliedMethod):
    """Train a fresh network as the original was trained, on the retained samples alone."""

    source: ClassVar[str] = "exact unlearning, by definition"
    formula: ClassVar[str] = "argmin over retain, from a fresh initialisation"
    no_retain_fraction: ClassVar[str] = "it trains on all retained samples"

    @classmethod
    def admits(cls, rule: str) -> tuple[bool, str]:
        return rule == "none", "retraining follows the rule of the original training; set it there"

    def apply(self, problem: Problem) -> tuple[nn.Module, Record]:
        if problem.retrain is None:
            raise UserError(
                "retrain needs to know how the model was trained: give --train-config FILE (in Python: make_model and "
                "train_config), or a checkpoint that unsharp trained"
            )
        return problem.retrain()
