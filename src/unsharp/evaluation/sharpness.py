"""Sharpness of a network over fixed samples: the largest, and the average, rise of its loss near its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from unsharp.data.samples import Samples
from unsharp.errors import unknown
from unsharp.evaluation.mean_loss import (
    Loss,
    MeanLoss,
    Weights,
    check_finite,
    check_positive,
    check_whole,
    cross_entropy,
)
from unsharp.gradients import groups_of
from unsharp.progress import SILENT, Progress
from unsharp.sharpness.correction import unit
from unsharp.sharpness.point import global_norm, scale_gradients

Geometry = Literal["sam", "asam", "tensor"]
START, NOISE = 1, 2


def scales(params: Sequence[Tensor], geometry: Geometry) -> Weights:
    """T, by which a perturbation is scaled: a perturbation ε has the length ‖T⁻¹ε‖₂, and is 0 where T is.

    Args:
        params: The weights.
        geometry: "sam": T = 1. "asam": T = |w|, the size of each weight. "tensor": the root mean square of the weights
            of a tensor, for each weight in it.

    Returns:
        Per tensor T, of the tensor's shape.
    """
    if geometry not in get_args(Geometry):
        raise unknown("geometry", geometry, get_args(Geometry))
    with torch.no_grad():
        if geometry == "sam":
            return [torch.ones_like(p) for p in params]
        if geometry == "asam":
            return [p.detach().abs() for p in params]
        return [p.detach().square().mean().sqrt().expand_as(p).clone() for p in params]


@dataclass(frozen=True)
class WorstCase:
    """How far the loss rises at most within a ball around the weights, as far as the ascent found.

    Args:
        loss: L(w), the mean loss where the network stands.
        worst_loss: The largest loss that was met in the ball: a lower bound of the maximum.
        rise: worst_loss − loss, at least 0.
        one_step_rise: The rise at the point to which one step of SAM (or ASAM) goes; it may be below 0.
        rises: (restarts,) the largest rise that each restart met; how far they agree tells how far to trust it.
        standard_error: Of `rise` over the groups of samples, where there are several; else None.
        n: Number of samples.
        passes: Passes over all samples: "values" (forward alone) and "gradients".
    """

    loss: float
    worst_loss: float
    rise: float
    one_step_rise: float
    rises: tuple[float, ...]
    standard_error: float | None
    n: int
    passes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class WorstCaseSharpness:
    """The largest rise of the mean loss within a ball of radius ρ around the weights, by projected gradient ascent.

    With u = T⁻¹ε the ball is ‖u‖₂ ≤ ρ, and a step is u ← Π(u + η·ρ·T∇L/‖T∇L‖₂), Π the projection to the ball. The first
    restart starts at the weights with a step of the whole radius, which is SAM's (or ASAM's) own perturbation, so that
    the result is never below that one; the others start at random places of the sphere. The largest loss on all ways
    counts.

    Args:
        rho: Radius ρ > 0 of the ball, in units of the scaled weights.
        geometry: "sam" (T = 1), "asam" (T = |w|) or "tensor" (T = root mean square of the tensor).
        steps: Steps of each restart, at least 1; with 1 step and 1 restart it is SAM's own perturbation.
        restarts: Number of ascents, at least 1.
        step_size: Length η > 0 of a step, as a share of ρ; None goes each time to the point of the sphere in the
            direction of the gradient, as an endless step would.
        group_size: Samples whose mean loss is taken to its own worst point, as in SAM's batches; their rises are
            averaged. None takes all samples together.
        batch_size: Samples that go through together, at least 1.
        seed: Seed of the random starts and of the groups.

    Raises:
        UserError: if a value is not as above.

    Source: Foret et al., ICLR 2021, eq. 1 (arXiv 2010.01412); Kwon et al., ICML 2021 (arXiv 2102.11600); several steps
    and restarts as in Madry et al., ICLR 2018 (arXiv 1706.06083), there for inputs.
    """

    rho: float = 0.1
    geometry: Geometry = "sam"
    steps: int = 10
    restarts: int = 2
    step_size: float | None = 2.0
    group_size: int | None = None
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("rho", self.rho)
        if self.geometry not in get_args(Geometry):
            raise unknown("geometry", self.geometry, get_args(Geometry))
        if self.step_size is not None:
            check_positive("step_size", self.step_size)
        for name in ("steps", "restarts", "batch_size"):
            check_whole(name, getattr(self, name))
        if self.group_size is not None:
            check_whole("group_size", self.group_size)
        check_whole("seed", self.seed, 0)

    @property
    def passes_needed(self) -> dict[str, int]:
        """Passes over all samples: {"values": forward alone, "gradients": forward and backward}."""
        return {"values": self.restarts, "gradients": self.restarts * self.steps}

    def measure(
        self,
        model: nn.Module,
        samples: Samples,
        indices: np.ndarray,
        *,
        loss: Loss = cross_entropy,
        progress: Progress = SILENT,
    ) -> WorstCase:
        """Climb, and tell how far it went; the network is left as it was, to the bit.

        Args:
            model: Maps (B, ...) inputs to (B, K) logits; its trainable parameters are perturbed.
            samples: Where the inputs come from.
            indices: (n,) positions in `samples`, at least one.
            loss: From logits and labels to a loss for each sample.
            progress: Told of each restart on each group.

        Raises:
            UserError: if there is no sample or no trainable parameter.
            NonFiniteError: if the loss at the weights or in the ball is not finite.
        """
        indices = np.asarray(indices)
        groups = [indices] if self.group_size is None else groups_of(indices, self.group_size, self.seed)
        progress.start("sharpness", len(groups) * self.restarts)
        climbs: list[Tensor] = []
        for group in groups:
            around = MeanLoss(model, samples, group, loss=loss, batch_size=self.batch_size)
            climbs.append(self._climbed(around, progress))
        progress.finish()
        losses = torch.stack(climbs).cpu()
        check_finite(losses, "a loss near the weights")
        # The first restart begins at the weights, and its first step is SAM's.
        return _summed_up(losses.numpy(), np.array([len(group) for group in groups]), self.passes_needed)

    def _climbed(self, around: MeanLoss, progress: Progress) -> Tensor:
        """(restarts, steps + 1) float64 on the device: the losses on all ways."""
        stretch = scales(around.params, self.geometry)
        found = []
        for restart in range(self.restarts):
            found.append(torch.stack(self._way(around, stretch, restart)))
            progress.advance()
        return torch.stack(found)

    def _way(self, around: MeanLoss, stretch: Weights, restart: int) -> list[Tensor]:
        at = self._start(around, stretch, restart)
        losses = []
        for step in range(self.steps):
            with around.moved(_times(at, stretch)):
                value, way = around.gradient()
            losses.append(value)
            way = _times(way, stretch)
            scale_gradients([*way], self.rho * unit(global_norm([*way])))
            if self.step_size is None or (restart == 0 and step == 0):
                at = way
                continue
            torch._foreach_add_(at, way, alpha=self.step_size)
            norm = global_norm([*at])
            scale_gradients([*at], torch.clamp(self.rho * unit(norm), max=1.0))
        with around.moved(_times(at, stretch)):
            losses.append(around.value())
        return losses

    def _start(self, around: MeanLoss, stretch: Weights, restart: int) -> Weights:
        if restart == 0:
            return [torch.zeros_like(p) for p in around.params]
        at = around.noise(self.seed, START, restart)
        torch._foreach_mul_(at, [(t != 0).to(t) for t in stretch])
        scale_gradients([*at], self.rho * unit(global_norm([*at])))
        return at


@dataclass(frozen=True)
class AverageCase:
    """How far the loss rises on average when the weights are disturbed at random.

    Args:
        loss: L(w), the mean loss where the network stands.
        rise: Mean of L(w + ε) − L(w) over the draws.
        standard_error: Of `rise`, over the pairs of draws ±ε; None for a single pair.
        rises: (draws,) the mean rise of each pair ±ε.
        n: Number of samples.
        passes: Passes over all samples: "values" (forward alone).
    """

    loss: float
    rise: float
    standard_error: float | None
    rises: tuple[float, ...]
    n: int
    passes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class AverageSharpness:
    """The mean rise of the loss when each weight gets independent normal noise of deviation σ·T.

    The noise comes in pairs ε, −ε, so that the slope of the loss cancels and what is left is its curvature: to second
    order the mean is ½σ²·tr(T·H·T).

    Args:
        sigma: Size σ > 0 of the noise: absolute with geometry "sam", relative to the weights with the others.
        geometry: "sam" (T = 1), "asam" (T = |w|) or "tensor" (T = root mean square of the tensor, so that the noise of
            a tensor is on average σ times as long as the tensor).
        draws: Number of pairs, at least 1; the standard error needs 2.
        batch_size: Samples that go through together, at least 1.
        seed: Seed of the noise.

    Raises:
        UserError: if a value is not as above.

    Source: average-case and adaptive average-case sharpness, Andriushchenko et al., ICML 2023 (arXiv 2302.07011).
    """

    sigma: float = 0.01
    geometry: Geometry = "tensor"
    draws: int = 20
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("sigma", self.sigma)
        if self.geometry not in get_args(Geometry):
            raise unknown("geometry", self.geometry, get_args(Geometry))
        check_whole("draws", self.draws)
        check_whole("batch_size", self.batch_size)
        check_whole("seed", self.seed, 0)

    @property
    def passes_needed(self) -> dict[str, int]:
        """Passes over all samples: {"values": forward alone}."""
        return {"values": 1 + 2 * self.draws}

    def measure(
        self,
        model: nn.Module,
        samples: Samples,
        indices: np.ndarray,
        *,
        loss: Loss = cross_entropy,
        progress: Progress = SILENT,
    ) -> AverageCase:
        """Disturb the weights, and tell how much was lost; the network is left as it was, to the bit.

        Args and errors are those of `WorstCaseSharpness.measure`; progress is told of each pair.
        """
        around = MeanLoss(model, samples, indices, loss=loss, batch_size=self.batch_size)
        stretch = scales(around.params, self.geometry)
        centre, pairs = around.value(), []
        progress.start("sharpness", self.draws)
        for draw in range(self.draws):
            offset = _times(around.noise(self.seed, NOISE, draw), stretch)
            torch._foreach_mul_(offset, self.sigma)
            with around.moved(offset):
                there = around.value()
            torch._foreach_neg_(offset)
            with around.moved(offset):
                pairs.append((there + around.value()) / 2)
            progress.advance()
        progress.finish()
        values = torch.stack([centre, *pairs]).cpu()
        check_finite(values, "a loss near the weights")
        rises = (values[1:] - values[0]).numpy()
        error = None if self.draws == 1 else float(rises.std(ddof=1) / np.sqrt(self.draws))
        return AverageCase(
            float(values[0]), float(rises.mean()), error, tuple(map(float, rises)), around.n, {**self.passes_needed}
        )


def _summed_up(losses: np.ndarray, sizes: np.ndarray, passes: dict[str, int]) -> WorstCase:
    """From (groups, restarts, steps + 1) losses and the groups' sizes to the figures."""
    weights = sizes / sizes.sum()
    centre = losses[:, 0, 0]
    ways = losses.max(axis=2) - centre[:, None]
    rises = np.maximum(ways.max(axis=1), 0.0)
    rise = float(weights @ rises)
    error = None
    if len(sizes) > 1:
        error = float(np.sqrt((weights**2 * (rises - rise) ** 2).sum() * len(sizes) / (len(sizes) - 1)))
    return WorstCase(
        loss=float(weights @ centre),
        worst_loss=float(weights @ (centre + rises)),
        rise=rise,
        one_step_rise=float(weights @ (losses[:, 0, 1] - centre)),
        rises=tuple(float(weights @ ways[:, restart]) for restart in range(losses.shape[1])),
        standard_error=error,
        n=int(sizes.sum()),
        passes=dict(passes),
    )


@torch.no_grad()
def _times(a: Sequence[Tensor], b: Sequence[Tensor]) -> Weights:
    return list(torch._foreach_mul(list(a), list(b)))
