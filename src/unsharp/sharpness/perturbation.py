"""SAM and ASAM, minimising or maximising sharpness: one perturbed gradient, one combination."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unsharp.errors import UserError
from unsharp.sharpness.base import RULES, Gradients, Rule
from unsharp.sharpness.point import Point, global_norm, keep_region, scale_gradients

SIGNS = {"min": 1.0, "max": -1.0}


@dataclass(frozen=True, kw_only=True)
class PerturbedGradient(Rule):
    """g = ∇L(w) + s·λ·(∇L(w + ε) − ∇L(w)), with ε = ρ·T²·g₀/‖T·g₀‖ over the perturbed weights.

    Args:
        rho: Radius ρ ≥ 0 of the ball, in units of the (scaled) weights.
        sign: "min" lowers sharpness (s = +1), "max" raises it (s = −1).
        lam: Weight λ ≥ 0 of the correction; 1 with "min" steps with the perturbed gradient itself.
        perturb: "region" perturbs the weights that this phase trains, "all" every trainable weight.
        max_form: For "max" only. "difference" is the formula above; "ascent" steps with the gradient at w − ε, the
            point to which the negated loss would ascend. Both agree to first order in ρ.
        every: Correct every so many steps; the steps between take the plain gradient.
    """

    rho: float
    sign: Literal["min", "max"] = "min"
    lam: float = 1.0
    perturb: Literal["region", "all"] = "region"
    max_form: Literal["difference", "ascent"] = "difference"
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("rho", "lam"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be a finite number of at least 0, got {value!r}")
        for name, known in (("sign", SIGNS), ("perturb", ("region", "all")), ("max_form", ("difference", "ascent"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.every < 1:
            raise UserError(f"every must be at least 1, got {self.every}")

    @property
    def passes(self) -> float:
        return 1 + (0 if self._is_off else 1) / self.every

    @property
    def passes_beside(self) -> float:
        return 1 + (0 if self._is_off else 1 if self._steps_with_g1 else 2) / self.every

    def turned(self) -> Rule:
        return dataclasses.replace(self, sign="max" if self.sign == "min" else "min")

    def gradient(self, point: Point) -> Gradients:
        if self._is_off or point.step % self.every:
            return point.gradient()
        if point.has_own_perturbation:
            direction = point.perturbation_gradient()
            g0 = None if self._steps_with_g1 else point.gradient_at(None)
        else:
            direction = point.gradient()
            g0 = None if self._steps_with_g1 else direction
        epsilon, norm = self._epsilon(point, direction, consume=direction is not g0)
        if self.max_form == "ascent" and self.sign == "max":
            scale_gradients(epsilon, norm.new_tensor(-1.0))
        del direction
        g1 = point.gradient_at(epsilon)
        if point.leak:
            keep_region(g1, point.region)
        g = self._combine(g0, g1)
        # where g₀ was not finite but ∇L(w + ε) happens to be, the step must still be seen to be broken
        scale_gradients(g, torch.where(torch.isfinite(norm), 1.0, math.nan))
        return g

    @abstractmethod
    def _scale_by_weights(self, point: Point, grads: Gradients) -> None:
        """Multiply the gradients by T, in place."""

    @property
    def _is_off(self) -> bool:
        return self.rho == 0 or self.lam == 0

    @property
    def _steps_with_g1(self) -> bool:
        return self.lam == 1 and (self.sign == "min" or self.max_form == "ascent")

    @torch.no_grad()
    def _epsilon(self, point: Point, g0: Gradients, *, consume: bool) -> tuple[Gradients, Tensor]:
        """ε and ‖T·g₀‖; reuses g₀'s memory where nobody needs it any more."""
        epsilon = g0 if consume else [None if g is None else g.clone() for g in g0]
        if self.perturb == "region":
            keep_region(epsilon, point.region)
        self._scale_by_weights(point, epsilon)
        norm = global_norm(epsilon)
        self._scale_by_weights(point, epsilon)
        scale_gradients(epsilon, torch.where(norm == 0, 0.0, self.rho / norm))
        return epsilon, norm

    @torch.no_grad()
    def _combine(self, g0: Gradients | None, g1: Gradients) -> Gradients:
        """g₀ + s·λ·(g₁ − g₀); a tensor that one pass does not reach counts as zero there."""
        if g0 is None:
            return g1
        weight = self.lam if self.max_form == "ascent" else self.lam * SIGNS[self.sign]
        for i, (a, b) in enumerate(zip(g0, g1)):
            if a is None and b is not None:
                g0[i] = b.mul_(weight)
            elif a is not None:
                a.add_(-a if b is None else b.sub_(a), alpha=weight)
        return g0


@RULES.register("sam")
@dataclass(frozen=True, kw_only=True)
class Sharpness(PerturbedGradient):
    """Sharpness-aware minimisation (SAM): the gradient at the worst point of a ball around the weights."""

    source: ClassVar[str] = "Foret et al., ICLR 2021, eq. 2–3 (arXiv 2010.01412)"
    formula: ClassVar[str] = "ε = ρ·g₀/‖g₀‖₂;  g = g₀ + s·λ·(∇L(w+ε) − g₀)"

    rho: float = 0.1

    def _scale_by_weights(self, point: Point, grads: Gradients) -> None:
        pass


@RULES.register("asam")
@dataclass(frozen=True, kw_only=True)
class AdaptiveSharpness(PerturbedGradient):
    """Adaptive SAM (ASAM): the ball is scaled by the size of each weight, so that rescaling a layer changes nothing.

    Args:
        eta: Added to |w|, so that small weights are perturbed too; the original takes 0.01.
        adapt: "all" scales every tensor; "weights" only those named `weight`, as the original does.
    """

    source: ClassVar[str] = "Kwon et al., ICML 2021, eq. 4 and Algorithm 1 (arXiv 2102.11600)"
    formula: ClassVar[str] = "ε = ρ·w²·g₀/‖|w|·g₀‖₂;  g = g₀ + s·λ·(∇L(w+ε) − g₀)"

    rho: float = 1.0
    eta: float = 0.0
    adapt: Literal["all", "weights"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise UserError(f"eta must be a finite number of at least 0, got {self.eta!r}")
        if self.adapt not in ("all", "weights"):
            raise UserError(f"adapt must be one of all, weights, got {self.adapt!r}")

    def _scale_by_weights(self, point: Point, grads: Gradients) -> None:
        if self.adapt == "weights" and point.names is None:
            raise UserError("adapt='weights' needs the names of the parameters; use adapt='all'")
        for i, (p, g) in enumerate(zip(point.params, grads)):
            if g is not None and (self.adapt == "all" or (point.names or ())[i].endswith("weight")):
                g.mul_(p.detach().abs() + self.eta if self.eta else p.detach().abs())
