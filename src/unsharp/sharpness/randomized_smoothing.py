"""Randomised smoothing: the gradient of the loss's mean over weights with Gaussian noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from unsharp.sharpness.base import RULES, Gradients
from unsharp.sharpness.correction import (
    CorrectedGradient,
    add_scaled,
    check_count,
    check_strength,
    divide,
    keep_perturbed,
    spoil_unless_finite,
)
from unsharp.sharpness.point import Point, global_norm


@RULES.register("randomized_smoothing")
@dataclass(frozen=True, kw_only=True)
class RandomizedSmoothing(CorrectedGradient):
    """Randomised smoothing: the mean gradient at weights with Gaussian noise, which blurs what is sharp.

    The noise of a step comes from a generator of its own on each device of the weights, seeded by torch's seed and the
    number of the step (`noise_seed`): draw after draw, and in each the trainable tensors in their order, standard
    normal in each tensor's own precision, times σ; what is not perturbed is drawn and then left out. So it moves no
    random state, is the same in every process of a distributed run, and comes again when a run is resumed.

    Args:
        sigma: Standard deviation σ ≥ 0 of the noise on each perturbed weight, in units of the weights.
        n_samples: Draws of noise in each step, at least 1.
        antithetic: Take the gradient at w − δ beside that at w + δ for each draw, which removes the noise's first-order
            effect and doubles the passes.
    """

    source: ClassVar[str] = (
        "Duchi et al., SIAM J. Optim. 2012 (arXiv 1103.4296); for unlearning: Fan et al., ICML 2025 (arXiv 2502.05374)"
    )
    formula: ClassVar[str] = "ĝ = mean over draws δ ~ N(0, σ²I) of ∇L(w+δ);  g = g₀ + s·λ·(ĝ − g₀)"
    strengths: ClassVar[tuple[str, ...]] = ("sigma", "lam")
    draws: ClassVar[bool] = True
    perturbs_by_another: ClassVar[bool] = False

    sigma: float = 0.01
    n_samples: int = 3
    antithetic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("sigma", self.sigma)
        check_count("n_samples", self.n_samples)

    @property
    def corrected_passes(self) -> float:
        return 1 + self.n_samples * self._sides

    def both(self, point: Point) -> tuple[Gradients | None, Gradients]:
        # The pass at w is there for BatchNorm's statistics even where its gradient is not wanted.
        g0 = point.gradient()
        norm = global_norm(g0)
        kept = None if self._is_flat else g0
        del g0
        mean: Gradients | None = None
        for found in self._gradients(point):
            mean = add_scaled(mean, found)
        assert mean is not None
        divide(mean, self.n_samples * self._sides)
        spoil_unless_finite(mean, norm)
        return kept, mean

    @property
    def _sides(self) -> int:
        return 2 if self.antithetic else 1

    def _gradients(self, point: Point) -> Iterator[Gradients]:
        generators = {
            device: torch.Generator(device).manual_seed(noise_seed(point.step))
            for device in {p.device for p in point.params}
        }
        for _ in range(self.n_samples):
            noise = self._noise(point, generators)
            turned: Gradients | None = None
            if self.antithetic:
                turned = [None if d is None else d.neg() for d in noise]
            yield point.gradient_at(noise)
            if turned is not None:
                yield point.gradient_at(turned)

    @torch.no_grad()
    def _noise(self, point: Point, generators: dict[torch.device, torch.Generator]) -> Gradients:
        noise: Gradients = [
            torch.randn(p.shape, generator=generators[p.device], dtype=p.dtype, device=p.device).mul_(self.sigma)
            for p in point.params
        ]
        keep_perturbed(noise, point, self.perturb)
        return noise


def noise_seed(step: int) -> int:
    """The seed of a step's noise: 63 bits that follow from torch's seed and the number of the step in its phase."""
    mixed = np.random.SeedSequence(torch.initial_seed(), spawn_key=(step,)).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))
