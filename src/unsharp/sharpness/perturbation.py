"""SAM and ASAM, minimising or maximising sharpness: one perturbed gradient, one combination."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unsharp.errors import UserError
from unsharp.sharpness.base import RULES, Gradients
from unsharp.sharpness.correction import (
    CorrectedGradient,
    check_strength,
    keep_perturbed,
    spoil_unless_finite,
)
from unsharp.sharpness.point import Point, global_norm, scale_gradients


@dataclass(frozen=True, kw_only=True)
class PerturbedGradient(CorrectedGradient):
    """g = ∇L(w) + s·λ·(∇L(w + ε) − ∇L(w)), with ε = ρ·T²·g₀/‖T·g₀‖ over the perturbed weights.

    Args:
        rho: Radius ρ ≥ 0 of the ball, in units of the (scaled) weights.
        max_form: For "max" only. "difference" is the formula above; "ascent" steps with the gradient at w − ε, the
            point to which the negated loss would ascend. Both agree to first order in ρ.
    """

    rho: float
    max_form: Literal["difference", "ascent"] = "difference"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("rho", self.rho)
        if self.max_form not in ("difference", "ascent"):
            raise UserError(f"max_form must be one of difference, ascent, got {self.max_form!r}")

    @property
    def corrected_passes(self) -> float:
        return 2

    @property
    def passes_beside(self) -> float:
        return self.passes if self._is_off or self._steps_with_g1 else self.passes + 1 / self.every

    def both(self, point: Point) -> tuple[Gradients | None, Gradients]:
        if point.has_own_perturbation:
            direction = point.perturbation_gradient()
            g0 = None if self._steps_with_g1 else point.gradient_at(None)
        else:
            direction = point.gradient()
            g0 = None if self._steps_with_g1 else direction
        epsilon, norm = self.epsilon(point, direction, consume=direction is not g0)
        if self.max_form == "ascent" and self.sign == "max":
            scale_gradients(epsilon, norm.new_tensor(-1.0))
        del direction
        g1 = point.gradient_at(epsilon)
        # where g₀ was not finite but ∇L(w + ε) happens to be, the step must still be seen to be broken
        spoil_unless_finite(g1, norm)
        return g0, g1

    @abstractmethod
    def _scale_by_weights(self, point: Point, grads: Gradients) -> None:
        """Multiply the gradients by T, in place."""

    @property
    def _weight(self) -> float:
        return self.lam if self.max_form == "ascent" else super()._weight

    @property
    def _steps_with_g1(self) -> bool:
        return self._is_flat

    @torch.no_grad()
    def epsilon(self, point: Point, g0: Gradients, *, consume: bool) -> tuple[Gradients, Tensor]:
        """ε in the direction of g₀, and ‖T·g₀‖; reuses g₀'s memory (`consume`) where nobody needs it any more."""
        epsilon = g0 if consume else [None if g is None else g.clone() for g in g0]
        keep_perturbed(epsilon, point, self.perturb)
        self._scale_by_weights(point, epsilon)
        norm = global_norm(epsilon)
        self._scale_by_weights(point, epsilon)
        scale_gradients(epsilon, torch.where(norm == 0, 0.0, self.rho / norm))
        return epsilon, norm


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
        check_strength("eta", self.eta)
        if self.adapt not in ("all", "weights"):
            raise UserError(f"adapt must be one of all, weights, got {self.adapt!r}")

    def _scale_by_weights(self, point: Point, grads: Gradients) -> None:
        if self.adapt == "weights" and point.names is None:
            raise UserError("adapt='weights' needs the names of the parameters; use adapt='all'")
        for i, (p, g) in enumerate(zip(point.params, grads)):
            if g is not None and (self.adapt == "all" or (point.names or ())[i].endswith("weight")):
                g.mul_(p.detach().abs() + self.eta if self.eta else p.detach().abs())
