"""SAM in one pass: the perturbation follows the gradient of the step before."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unsharp.sharpness.base import RULES, Gradients, Rule
from unsharp.sharpness.correction import SIGNS
from unsharp.sharpness.perturbation import AdaptiveSharpness, PerturbedGradient, Sharpness
from unsharp.sharpness.point import Point, scale_gradients

LAST = "last"


@RULES.register("s2sam")
@dataclass(frozen=True, kw_only=True)
class SingleStepSharpness(Rule):
    """Step with the gradient at a perturbed point that the last step's gradient points at, in a single pass.

    Statistics of BatchNorm are those of the perturbed weights, since no pass is taken at the others.

    Args:
        rho: Radius ρ ≥ 0.
        sign: "min" goes up the loss by ρ, "max" goes down by it, as the form "ascent" of `sam` does.
        adaptive: Perturb as ASAM does.
        perturb: "region" perturbs the weights that this phase trains, "all" every trainable weight.
    """

    source: ClassVar[str] = "Ji et al., NeurIPS 2024 (single-step SAM, S²-SAM), from its abstract"
    formula: ClassVar[str] = "g_t = ∇L(w_t + s·ε_t), ε_t = ρ·T²·g_{t−1}/‖T·g_{t−1}‖₂"
    starts_at_weights: ClassVar[bool] = False
    perturbs_by_another: ClassVar[bool] = False

    rho: float = 0.1
    sign: Literal["min", "max"] = "min"
    adaptive: bool = False
    perturb: Literal["region", "all"] = "region"

    def __post_init__(self) -> None:
        self._ball()

    @property
    def passes(self) -> float:
        return 1

    def _ball(self) -> PerturbedGradient:
        """The rule whose ε this one takes; it refuses values out of range."""
        kind = AdaptiveSharpness if self.adaptive else Sharpness
        return kind(rho=self.rho, sign=self.sign, perturb=self.perturb)

    def turned(self) -> Rule:
        return dataclasses.replace(self, sign="max" if self.sign == "min" else "min")

    def gradient(self, point: Point) -> Gradients:
        if self.rho == 0:
            return point.gradient()
        last: list[Tensor | None] | None = point.memory.get(LAST)
        if last is None:
            g = point.gradient()
        else:
            epsilon, norm = self._ball().epsilon(point, last, consume=False)
            scale_gradients(epsilon, norm.new_tensor(SIGNS[self.sign]))
            g = point.gradient_at(epsilon, first=True)
        point.memory[LAST] = [None if x is None else _finite(x) for x in g]
        return g


@torch.no_grad()
def _finite(x: Tensor) -> Tensor:
    """A copy without what is not finite: a broken step must not spoil the next one's direction."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
