"""The first-order update: one gradient step from samples as they were to those that should be, or to none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from unsharp.errors import UserError
from unsharp.methods.base import METHODS, Problem
from unsharp.methods.closed_form import ClosedForm, Step


@METHODS.register("first_order")
@dataclass(frozen=True, kw_only=True)
class FirstOrder(ClosedForm):
    """One gradient step from wrong samples to right ones or, without corrections, one that takes the samples back.

    Args:
        tau: Rate τ of the step along the sum over the samples, above 0; what suits falls with their number.
    """

    formula: ClassVar[str] = "v = Σ over forget of ∇ℓ(corrected) − ∇ℓ(as it was);  w ← w − τ·v on the chosen weights"
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"tau": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
    draws: ClassVar[bool] = False

    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise UserError(f"tau must be a finite number above 0, got {self.tau}")

    def _products(self) -> int:
        return 0

    def _step(self, problem: Problem, network: nn.Module, v: Tensor, chosen: Tensor | None) -> Step:
        return Step(-self.tau * v)
