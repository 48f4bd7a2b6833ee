"""m-sharpness: each micro-batch is perturbed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unsharp.errors import UserError
from unsharp.sharpness.base import RULES, Gradients, Site
from unsharp.sharpness.correction import add_scaled, check_count, divide
from unsharp.sharpness.perturbation import AdaptiveSharpness, PerturbedGradient
from unsharp.sharpness.point import Point


@RULES.register("msam")
@dataclass(frozen=True, kw_only=True)
class MicroBatchSharpness(PerturbedGradient):
    """m-sharpness: SAM on each micro-batch by itself, each with a perturbation of its own; step with the mean.

    BatchNorm sees the micro-batches, one after the other, and normalises each by itself.

    Args:
        micro_batches: Parts of nearly equal size, at least 1, into which each batch is cut; 1 is `sam`.
        adaptive: Perturb as ASAM does.
    """

    source: ClassVar[str] = (
        "Foret et al., ICLR 2021, section 4.1 (arXiv 2010.01412); Behdin et al. 2022 (mSAM, arXiv 2212.04343)"
    )
    formula: ClassVar[str] = (
        "ε_k = ρ·∇L_k/‖∇L_k‖₂ on micro-batch k;  ĝ = mean over k of ∇L_k(w+ε_k);  g = g₀ + s·λ·(ĝ − g₀)"
    )

    rho: float = 0.1
    micro_batches: int = 2
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("micro_batches", self.micro_batches)

    @property
    def pieces(self) -> int:
        return 1 if self._is_off else self.micro_batches

    def check(self, site: Site) -> None:
        super().check(site)
        if self.pieces > site.smallest_batch:
            raise UserError(
                f"micro_batches is {self.micro_batches}, but the smallest batch of phase {site.name!r} has "
                f"{site.smallest_batch} samples in a process; take fewer micro-batches, or larger batches"
            )

    def both(self, point: Point) -> tuple[Gradients | None, Gradients]:
        parts = point.parts(self.micro_batches)
        plain: Gradients | None = None
        flat: Gradients | None = None
        for part in parts:
            g0, g1 = super().both(part)
            plain = plain if g0 is None else add_scaled(plain, g0)
            flat = add_scaled(flat, g1)
        assert flat is not None
        for total in (plain, flat):
            divide(total or [], len(parts))
        # what follows the loss, as SAUL's multiplier does, is to see all of the batch
        point.loss, point.last_loss = _mean([p.loss for p in parts]), _mean([p.last_loss for p in parts])
        return plain, flat

    def _scale_by_weights(self, point: Point, grads: Gradients) -> None:
        if self.adaptive:
            AdaptiveSharpness()._scale_by_weights(point, grads)


def _mean(losses: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([loss for loss in losses if loss is not None]).mean()
