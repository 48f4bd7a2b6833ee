"""SAUL: keep the retain loss low under the constraint that the forget loss is high enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unsharp.errors import UserError
from unsharp.methods.base import METHODS, PhasedMethod, Problem
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Phase, Scale


@dataclass(frozen=True, kw_only=True)
class Multiplier(Scale):
    """The augmented Lagrangian's multiplier: λ ← [λ + μ·(level − L_F)]₊, the weight of the forget step.

    It serves any phase that minimises −L_F for an L_F that is to be at least `level`: give it as the phase's `scale`,
    and the method `separate_states`, so that the phase rests where λ is 0.

    Args:
        level: What L_F is to reach, finite; in nats, for a cross-entropy.
        rate: μ > 0.
    """

    level: float
    rate: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.level):
            raise UserError(f"level must be finite, got {self.level}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise UserError(f"rate must be a finite number above 0, got {self.rate}")

    def factor(self, loss: Tensor, memory: dict[str, Any]) -> Tensor:
        before = memory.get("multiplier", torch.zeros_like(loss))
        after = (before + self.rate * (self.level + loss)).clamp_(min=0)  # the phase's loss is −L_F
        memory["multiplier"] = torch.where(torch.isfinite(after), after, before)
        return after


@METHODS.register("saul")
@dataclass(frozen=True, kw_only=True)
class SAUL(PhasedMethod):
    """Minimise the retain loss subject to a forget loss of at least a level; a multiplier weighs the forget step.

    Both gradients are taken at the same weights, each at its own perturbed point; each has its own optimiser state.
    Where the multiplier is 0 the forget step is left out, and its optimiser rests. The retain optimiser alone decays.

    Args:
        forget_level: Forget loss that is asked for, in nats, above 0; None takes ln K for K classes, that of a guess.
        multiplier_rate: Step μ > 0 of the multiplier.
    """

    source: ClassVar[str] = "Choi, Yang & Park 2026 (SAUL), from notes on the paper"
    formula: ClassVar[str] = (
        "min L_R subject to L_F ≥ level;  λ ← [λ + μ·(level − L_F(w+ε_F))]₊;  "
        "step with −λ·∇L_F(w+ε_F), if λ > 0, and with ∇L_R(w+ε_R)"
    )
    default_rule: ClassVar[str] = "sam"
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"forget_level": (0.5, 1.0, 2.0, 3.0, 4.0)}
    separate_states: ClassVar[bool] = True

    forget_level: float | None = None
    multiplier_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("forget_level", "multiplier_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} must be a finite number above 0, got {value}")

    def phases(self, problem: Problem) -> list[Phase]:
        level = math.log(problem.samples.n_classes) if self.forget_level is None else self.forget_level
        return [
            Phase(objective=CrossEntropy({RETAIN: 1.0}), rule=problem.rule, name=RETAIN),
            Phase(
                objective=CrossEntropy({FORGET: -1.0}),
                rule=problem.rule,
                scale=Multiplier(level=level, rate=self.multiplier_rate),
                name=FORGET,
            ),
        ]
