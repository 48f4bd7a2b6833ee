"""The gradient penalty: a loss that counts the length of its own gradient in, differentiated exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unsharp.sharpness.base import RULES, Gradients
from unsharp.sharpness.correction import CorrectedGradient, add_scaled, check_strength, keep_perturbed, unit
from unsharp.sharpness.point import Point, global_norm, scale_gradients
from unsharp.sharpness.second_order import differentiated, hessian_product


@RULES.register("gradient_penalty")
@dataclass(frozen=True, kw_only=True)
class GradientPenalty(CorrectedGradient):
    """Gradient penalty: step with the exact gradient of the loss plus the length of its gradient.

    Args:
        penalty: Weight ≥ 0 of the gradient's length in the loss; to first order that of `sam` with this radius.
        perturb: Whose gradient's length is meant: "region" that of the weights that this phase trains, "all" that of
            every trainable weight, "norm" that of normalisation layers among the ones that this phase trains.
    """

    source: ClassVar[str] = (
        "Zhao et al., ICML 2022 (arXiv 2202.03599); for unlearning: Fan et al., ICML 2025 (arXiv 2502.05374), from "
        "notes on it"
    )
    formula: ClassVar[str] = "ĝ = ∇(L + penalty·‖∇L‖₂) = g₀ + penalty·H·g₀/‖g₀‖₂;  g = g₀ + s·λ·(ĝ − g₀)"
    strengths: ClassVar[tuple[str, ...]] = ("penalty", "lam")
    perturbs_by_another: ClassVar[bool] = False

    penalty: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("penalty", self.penalty)

    @property
    def corrected_passes(self) -> float:
        return 2

    def both(self, point: Point) -> tuple[Gradients | None, Gradients]:
        with point.graph() as loss:
            own, g0 = differentiated(loss, point.params)
            direction: Gradients = [None if g is None else g.clone() for g in g0]
            keep_perturbed(direction, point, self.perturb)
            scale_gradients(direction, unit(global_norm(direction)))
            product = hessian_product(own, point.params, direction)
        kept: Gradients | None = None if self._is_flat else [None if g is None else g.clone() for g in g0]
        return kept, add_scaled(g0, product, self.penalty)
