"""The curvature penalty: a loss that counts in how much its gradient changes a little way along itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from unsharp.errors import UserError
from unsharp.sharpness.base import RULES, Gradients
from unsharp.sharpness.correction import (
    CorrectedGradient,
    add_scaled,
    check_strength,
    keep_perturbed,
    spoil_unless_finite,
    unit,
)
from unsharp.sharpness.point import Point, global_norm, scale_gradients
from unsharp.sharpness.second_order import differentiated, hessian_product


@RULES.register("curvature")
@dataclass(frozen=True, kw_only=True)
class CurvaturePenalty(CorrectedGradient):
    """Curvature penalty: step with the exact gradient of the loss plus the change of its gradient along itself.

    Args:
        penalty: Weight ≥ 0 of the penalty in the loss.
        distance: Length μ > 0 of the way along the gradient, in units of the weights.
        perturb: "region" goes along, and measures the change in, the weights that this phase trains, "all" every
            trainable weight, "norm" those of normalisation layers among the ones that this phase trains.
    """

    source: ClassVar[str] = (
        "Moosavi-Dezfooli et al., CVPR 2019 (arXiv 1811.09716), there for inputs; in the weights, for unlearning: "
        "Fan et al., ICML 2025 (arXiv 2502.05374), from notes on it"
    )
    formula: ClassVar[str] = "v = g₀/‖g₀‖₂, held fixed;  ĝ = ∇(L + penalty·‖∇L(w+μv) − ∇L(w)‖₂);  g = g₀ + s·λ·(ĝ − g₀)"
    strengths: ClassVar[tuple[str, ...]] = ("penalty", "lam")
    perturbs_by_another: ClassVar[bool] = False

    penalty: float = 0.05
    distance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("penalty", self.penalty)
        check_strength("distance", self.distance)
        if self.distance == 0:
            raise UserError("distance must be above 0: no gradient changes over no distance; got 0")

    @property
    def corrected_passes(self) -> float:
        return 5

    def both(self, point: Point) -> tuple[Gradients | None, Gradients]:
        g0 = point.gradient()
        way: Gradients = [None if g is None else g.clone() for g in g0]
        keep_perturbed(way, point, self.perturb)
        scale_gradients(way, self.distance * unit(global_norm(way)))
        # ∇‖d‖ = (H(w+μv) − H(w))·d/‖d‖; one graph at a time, since moving the weights would spoil the other
        with point.graph(way, first=False) as loss:
            own, there = differentiated(loss, point.params)
            change = _change(there, g0)
            keep_perturbed(change, point, self.perturb)
            length = global_norm(change)
            scale_gradients(change, unit(length))
            correction = hessian_product(own, point.params, change)
        del own, loss
        beside = point.last_loss
        with point.graph(first=False) as loss:
            own, again = differentiated(loss, point.params)
            correction = add_scaled(correction, hessian_product(own, point.params, change), -1.0)
        point.last_loss = beside  # as under SAM, what follows the loss sees it at the weights beside w
        kept: Gradients | None = None if self._is_flat else [None if g is None else g.clone() for g in g0]
        flat = add_scaled(g0, correction, self.penalty)
        spoil_unless_finite(flat, length + global_norm(again))
        return kept, flat


@torch.no_grad()
def _change(there: Gradients, here: Gradients) -> Gradients:
    """The one minus the other, in the first one's memory; a tensor that one of them lacks is zero there."""
    return [
        a if b is None else b.neg() if a is None else a.sub_(b.to(a.dtype)) for a, b in zip(there, here, strict=True)
    ]
