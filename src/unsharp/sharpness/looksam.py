"""LookSAM: the part of the correction that turns slowly is computed now and then, and used again between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unsharp.errors import UserError
from unsharp.sharpness.base import RULES, Gradients
from unsharp.sharpness.correction import SIGNS
from unsharp.sharpness.perturbation import AdaptiveSharpness, PerturbedGradient
from unsharp.sharpness.point import Point, global_norm, keep_region

ACROSS = "across"


@RULES.register("looksam")
@dataclass(frozen=True, kw_only=True)
class LookSharpness(PerturbedGradient):
    """LookSAM: a full SAM step every few steps; between them the gradient, turned by what that step found across it.

    Args:
        every: Full steps are taken every so many steps.
        reuse: Length of what is added between full steps, relative to the gradient, at least 0.
        adaptive: Perturb as ASAM does.
    """

    source: ClassVar[str] = "Liu et al., CVPR 2022 (arXiv 2203.02714)"
    formula: ClassVar[str] = (
        "every k-th step: g₁ = ∇L(w+ε), v = g₁ − (g₁·g₀/‖g₀‖²)·g₀, g = g₀ + s·λ·(g₁ − g₀);  "
        "between: g = g₀ + s·λ·reuse·(‖g₀‖/‖v‖)·v"
    )
    perturbs_by_another: ClassVar[bool] = False

    rho: float = 0.1
    every: int = 5
    reuse: float = 0.7
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.reuse) and self.reuse >= 0):
            raise UserError(f"reuse must be a finite number of at least 0, got {self.reuse!r}")

    @property
    def _steps_with_g1(self) -> bool:
        return False  # the part across g₀ needs both

    def gradient(self, point: Point) -> Gradients:
        if not self._is_off and (point.step % self.every or point.has_own_perturbation):
            if point.has_own_perturbation:
                raise UserError("looksam needs the perturbation of the loss itself; take rule sam with every=k")
            return self._between(point)
        return super().gradient(point)

    def _scale_by_weights(self, point: Point, grads: Gradients) -> None:
        if self.adaptive:
            AdaptiveSharpness()._scale_by_weights(point, grads)

    @torch.no_grad()
    def _between(self, point: Point) -> Gradients:
        g = point.gradient()
        across: list[Tensor] | None = point.memory.get(ACROSS)
        if across is None:
            return g
        own = _kept(g, point)
        length = global_norm(list(across))
        sign = 1.0 if self.max_form == "ascent" else SIGNS[self.sign]  # ascent has turned the point already
        factor = sign * self.lam * self.reuse * global_norm(own) / length
        factor = torch.where(length == 0, 0.0, factor)
        return [x if x is None else x.addcmul(a, factor.to(x)) for x, a in zip(g, across)]

    @torch.no_grad()
    def _combine(self, g0: Gradients | None, g1: Gradients, point: Point) -> Gradients:
        before, now = _kept(g0 or [], point), _kept(g1, point)
        inner = _dot(before, now) / _dot(before, before)
        across = [_across(a, b, p, inner) for a, b, p in zip(before, now, point.params)]
        good = torch.isfinite(global_norm(list(across)))
        point.memory[ACROSS] = [torch.where(good, a, torch.zeros_like(a)) for a in across]
        return super()._combine(g0, g1, point)


def _kept(grads: Gradients, point: Point) -> Gradients:
    """A copy of the gradients, kept to the region."""
    own = [None if g is None else g.clone() for g in grads]
    keep_region(own, point.region)
    return own


def _dot(a: Gradients, b: Gradients) -> Tensor:
    parts = [
        (x.float() * y.float()).sum() if x.itemsize < 4 else (x * y).sum()
        for x, y in zip(a, b)
        if x is not None and y is not None
    ]
    return torch.stack(parts).sum() if parts else torch.ones(())


def _across(g0: Tensor | None, g1: Tensor | None, p: Tensor, inner: Tensor) -> Tensor:
    """g₁ − inner·g₀; a tensor that a pass does not reach counts as zero."""
    along = torch.zeros_like(p) if g0 is None else g0 * inner.to(g0)
    return -along if g1 is None else g1 - along
