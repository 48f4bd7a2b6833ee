"""What most rules share: a plain gradient g₀, another gradient ĝ, and how far to go from the one to the other."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unsharp.errors import UserError
from unsharp.sharpness.base import Gradients, Rule, Site
from unsharp.sharpness.point import Point, keep_region, scale_gradients

SIGNS = {"min": 1.0, "max": -1.0}
PERTURBED = ("region", "all", "norm")


@dataclass(frozen=True, kw_only=True)
class CorrectedGradient(Rule):
    """g = g₀ + s·λ·(ĝ − g₀), with g₀ = ∇L(w) and ĝ the gradient of a loss that counts sharpness in.

    Args:
        sign: "min" lowers sharpness (s = +1), "max" raises it (s = −1).
        lam: Weight λ ≥ 0 of the correction; 1 with "min" steps with ĝ itself.
        perturb: "region" perturbs the weights that this phase trains, "all" every trainable weight, "norm" those of
            normalisation layers among the ones that this phase trains.
        every: Correct every so many steps; the steps between take the plain gradient.
    """

    sign: Literal["min", "max"] = "min"
    lam: float = 1.0
    perturb: Literal["region", "all", "norm"] = "region"
    every: int = 1

    def __post_init__(self) -> None:
        check_strength("lam", self.lam)
        for name, known in (("sign", SIGNS), ("perturb", PERTURBED)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_count("every", self.every)

    @property
    @abstractmethod
    def corrected_passes(self) -> float:
        """Forward–backward passes of a step that corrects."""

    @abstractmethod
    def both(self, point: Point) -> tuple[Gradients | None, Gradients]:
        """g₀ (None where the step is ĝ itself and g₀ is not wanted) and ĝ; non-finite where any pass was."""

    @property
    def passes(self) -> float:
        return 1 + (0 if self._is_off else self.corrected_passes - 1) / self.every

    def check(self, site: Site) -> None:
        if self._is_off or self.perturb != "norm":
            return
        if not any(site.norms):
            raise UserError(
                "perturb='norm' perturbs normalisation layers alone, and this network has none with trainable weights; "
                "take perturb='region'"
            )
        region = site.region or [None] * len(site.norms)
        if not any(norm and (m is None or bool(m.any())) for norm, m in zip(site.norms, region)):
            raise UserError(
                f"perturb='norm' perturbs normalisation layers alone, and phase {site.name!r} trains none of their "
                "weights; take perturb='region', or another mask"
            )

    def turned(self) -> Rule:
        return dataclasses.replace(self, sign="max" if self.sign == "min" else "min")

    def gradient(self, point: Point) -> Gradients:
        if self._is_off or point.step % self.every:
            return point.gradient()
        g0, flat = self.both(point)
        if point.leak:
            keep_region(flat, point.region)
        return self._combine(g0, flat, point)

    @property
    def _is_off(self) -> bool:
        return any(getattr(self, name, None) == 0 for name in self.strengths)

    @property
    def _weight(self) -> float:
        """s·λ."""
        return self.lam * SIGNS[self.sign]

    @property
    def _is_flat(self) -> bool:
        """Whether the step is ĝ itself."""
        return self._weight == 1

    @torch.no_grad()
    def _combine(self, g0: Gradients | None, flat: Gradients, point: Point, /) -> Gradients:
        """g₀ + s·λ·(ĝ − g₀); a tensor that one pass does not reach counts as zero there."""
        if g0 is None:
            return flat
        weight = self._weight
        for i, (a, b) in enumerate(zip(g0, flat)):
            if a is None and b is not None:
                g0[i] = b.mul_(weight)
            elif a is not None:
                a.add_(-a if b is None else b.sub_(a), alpha=weight)
        return g0


@torch.no_grad()
def keep_perturbed(grads: Gradients, point: Point, perturb: str) -> None:
    """Zero what is not perturbed, in place; NaN stays NaN, so that it is noticed."""
    if perturb == "all":
        return
    keep_region(grads, point.region)
    if perturb == "norm":
        if point.norms is None:
            raise UserError(
                "perturb='norm' needs to know which weights belong to normalisation layers; take perturb='region'"
            )
        for g, norm in zip(grads, point.norms):
            if g is not None and not norm:
                g.mul_(0.0)


@torch.no_grad()
def inner_product(a: Gradients, b: Gradients) -> Tensor:
    """⟨a, b⟩ over all tensors, 0-d, in at least float32; a tensor that one of them lacks is zero there."""
    sums: list[Tensor] = []
    for x, y in zip(a, b):
        if x is not None and y is not None:
            dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
            sums.append((x.to(dtype) * y.to(dtype)).sum())
    return torch.stack([s.to(sums[0].device) for s in sums]).sum() if sums else torch.zeros(())


@torch.no_grad()
def add_scaled(a: Gradients | None, b: Gradients, factor: float = 1.0) -> Gradients:
    """a + factor·b, in a's memory, or b's; what one of them lacks is zero there."""
    found: list[Tensor | None] = []
    for x, y in zip(a or [None] * len(b), b, strict=True):
        found.append(
            x if y is None else (y if factor == 1 else y.mul(factor)) if x is None else x.add_(y, alpha=factor)
        )
    return found


@torch.no_grad()
def divide(grads: Gradients, n: int) -> None:
    """Divide all gradients by n, in place."""
    present = [g for g in grads if g is not None]
    if present and n > 1:
        torch._foreach_div_(present, n)


@torch.no_grad()
def unit(norm: Tensor) -> Tensor:
    """1/norm, and 0 where the norm is 0."""
    return torch.where(norm == 0, 0.0, 1 / norm)


@torch.no_grad()
def spoil_unless_finite(grads: Gradients, norm: Tensor) -> None:
    """Make the gradients NaN where this norm, of a pass that they may not show, is not finite."""
    scale_gradients(grads, torch.where(torch.isfinite(norm), 1.0, math.nan))


def check_strength(name: str, value: float) -> None:
    """Raises: UserError unless `value` is a finite number of at least 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise UserError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_count(name: str, value: int) -> None:
    """Raises: UserError if `value` is below 1."""
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")
