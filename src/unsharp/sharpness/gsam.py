"""GSAM: SAM that also closes the gap between the loss at the worst point near by and the loss itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from unsharp.sharpness.base import RULES, Gradients
from unsharp.sharpness.correction import add_scaled, check_strength, inner_product
from unsharp.sharpness.perturbation import AdaptiveSharpness, PerturbedGradient
from unsharp.sharpness.point import Point, keep_region, scale_gradients


@RULES.register("gsam")
@dataclass(frozen=True, kw_only=True)
class SurrogateGap(PerturbedGradient):
    """GSAM: the gradient of SAM, less what of the plain gradient lies across it, so that the gap between them closes.

    Args:
        gap_weight: Weight ≥ 0 of the part that is taken off (α of the paper); 0 is `sam`.
        adaptive: Perturb as ASAM does.
    """

    source: ClassVar[str] = "Zhuang et al., ICLR 2022, Algorithm 1 (arXiv 2203.08065)"
    formula: ClassVar[str] = (
        "g_p = ∇L(w+ε);  ĝ = g_p − gap_weight·(g₀ − (⟨g₀, g_p⟩/‖g_p‖²)·g_p);  g = g₀ + s·λ·(ĝ − g₀)"
    )

    rho: float = 0.1
    gap_weight: float = 0.1
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("gap_weight", self.gap_weight)

    def both(self, point: Point) -> tuple[Gradients | None, Gradients]:
        g0, g1 = super().both(point)
        if g0 is None or self.gap_weight == 0:
            return g0, g1
        keep_region(g1, point.region)
        flat = self._less_across(g0, g1)
        return (None if self._is_flat else g0), flat

    @torch.no_grad()
    def _less_across(self, g0: Gradients, g1: Gradients) -> Gradients:
        """g₁ less the part of g₀ across it, in g₁'s memory; g₁ is kept to the region, outside which nothing counts."""
        square = inner_product(g1, g1)
        along = torch.where(square == 0, 0.0, inner_product(g0, g1) / square)
        scale_gradients(g1, 1 + self.gap_weight * along)
        return add_scaled(g1, g0, -self.gap_weight)

    def _scale_by_weights(self, point: Point, grads: Gradients) -> None:
        if self.adaptive:
            AdaptiveSharpness()._scale_by_weights(point, grads)

    @property
    def _steps_with_g1(self) -> bool:
        return self._is_flat and self.gap_weight == 0
