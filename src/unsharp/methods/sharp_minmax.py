"""Sharp MinMax: retain weights under sharpness minimisation, forget weights under sharpness maximisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from unsharp import masks
from unsharp.errors import UserError
from unsharp.methods.base import METHODS, PhasedMethod, Problem, alpha_cancels, check_fraction
from unsharp.methods.masked import ALL, ByMask
from unsharp.phases import FORGET, RETAIN, CrossEntropy, Phase
from unsharp.sharpness.base import Rule
from unsharp.sharpness.perturbation import PerturbedGradient


@METHODS.register("sharp_minmax")
@dataclass(frozen=True, kw_only=True)
class SharpMinMax(ByMask, PhasedMethod):
    """Split the weights by saliency for the forget set; the salient ones forget, sharply, the others retain, flatly.

    Args:
        alpha: Weight α in [0, 1] of the retain loss; the forget loss has weight −(1−α).
        fraction: Share of the weights in (0, 1) that forgets.
        select: Which weights forget: a selection (`unsharp list selections`), such as largest, the largest forget
            gradients, or smallest, as the published code has it; or "all": no split, both parts move every weight.
        rho_retain: Radius of the retain phase; None takes the rule's.
        rho_forget: Radius of the forget phase; None takes the rule's.
        leak: Keep only the perturbed gradients to their parts, as the published code does: the forget step is
            2·g₀ − M∘g₁, so that every retain weight receives twice the forget gradient.
    """

    source: ClassVar[str] = "Tang & Khanna, ICLR 2026 (arXiv 2506.13715)"
    formula: ClassVar[str] = (
        "retain weights: min α·CE(retain) + sharpness;  forget weights: min −(1−α)·CE(forget) − sharpness"
    )
    default_rule: ClassVar[str] = "asam"
    tunable: ClassVar[Mapping[str, Sequence[Any]]] = {"alpha": (0.8, 0.9, 0.95, 0.98, 0.99)}

    alpha: float = 0.99
    rho_retain: float | None = None
    rho_forget: float | None = None
    leak: bool = False

    def __post_init__(self) -> None:
        check_fraction("alpha", self.alpha)
        if not 0 < self.fraction < 1:
            raise UserError(f"fraction must be in (0, 1), so that both parts have weights, got {self.fraction}")
        for name in ("rho_retain", "rho_forget"):
            rho = getattr(self, name)
            if rho is not None and not (math.isfinite(rho) and rho >= 0):
                raise UserError(f"{name} must be a finite number of at least 0, got {rho}")
        self._check_mask()

    def phases(self, problem: Problem) -> list[Phase]:
        mask = self._mask(problem)
        if mask is not None and not 0 < masks.fraction_of(mask) < 1:
            raise UserError(
                f"fraction {self.fraction} with select {self.select!r} leaves a part empty of weights; take another"
            )
        return [
            Phase(
                objective=CrossEntropy({RETAIN: self.alpha}),
                rule=_with_radius(problem.rule, self.rho_retain),
                region=None if mask is None else masks.complement(mask),
                leak=self.leak,
                name=RETAIN,
            ),
            Phase(
                objective=CrossEntropy({FORGET: -(1 - self.alpha)}),
                rule=_with_radius(problem.rule, self.rho_forget).turned(),
                region=mask,
                leak=self.leak,
                name=FORGET,
            ),
        ]

    def cautions(self, *, scale_free: bool, apart: bool) -> list[str]:
        shared = self.select == ALL or self.leak
        return alpha_cancels(self.alpha) if scale_free and (apart or not shared) else []

    def preparation_passes(self, problem: Problem, batch_size: int) -> int:
        return self._mask_passes(problem, batch_size)


def _with_radius(rule: Rule, rho: float | None) -> Rule:
    if rho is None:
        return rule
    if not isinstance(rule, PerturbedGradient):
        raise UserError("rho_retain and rho_forget need a rule with a radius; choose rule sam or asam")
    return dataclasses.replace(rule, rho=rho)
