"""Curvature of the loss around a sample, averaged over training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unsharp import runtime
from unsharp.data.streams import evaluation_batches
from unsharp.difficulty.proxies.base import PROXIES, Task, check_count
from unsharp.difficulty.proxies.networks import PointProxy
from unsharp.errors import UserError, unknown
from unsharp.models.modes import evaluating

STATISTICS = ("squared", "norm")
MASK = 2**64 - 1
# The increments and multipliers of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), which scatter a counter over 64 bits.
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@PROXIES.register("loss_curvature")
@dataclass(frozen=True, kw_only=True)
class LossCurvature(PointProxy):
    """Curvature of the loss around a sample, by its pixels, averaged over the epochs of training.

    Args:
        draws: Random directions in which the curvature is measured each time, at least 1.
        step: Length h > 0 of the step in each pixel, in units of the normalised inputs.
        every_epochs: Epochs between two measurements, at least 1; the last epoch is always among them.
        statistic: "squared" averages ‖Hv‖², which is the trace of H², "norm" averages ‖Hv‖, as published code does.
    """

    title: ClassVar[str] = "loss curvature"
    source: ClassVar[str] = "Garg, Ravikumar & Roy, ICML 2024 (arXiv 2307.05831)"
    formula: ClassVar[str] = (
        "tr(H²) ≈ mean over v of ‖(∇ₓCE(x + h·v) − ∇ₓCE(x))/h‖₂²;  v ∈ {−1, 1}^d, averaged over epochs"
    )

    draws: int = 10
    step: float = 1e-3
    every_epochs: int = 1
    statistic: Literal["squared", "norm"] = "squared"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("draws", self.draws)
        check_count("every_epochs", self.every_epochs)
        if not (math.isfinite(self.step) and self.step > 0):
            raise UserError(f"step must be a finite number above 0, got {self.step}")
        if self.statistic not in STATISTICS:
            raise unknown("statistic", self.statistic, STATISTICS)

    def check(self, task: Task) -> None:
        (batch,) = task.samples.batches(task.indices[:1], [1], draws=None)
        if not batch.inputs.is_floating_point():
            raise UserError(f"loss_curvature needs inputs that are real numbers, these are {batch.inputs.dtype}")

    def moments(self, epochs: int) -> Collection[int]:
        return range(epochs, 0, -self.every_epochs)

    def passes_each(self) -> float:
        return 1.0 + self.draws

    def score(self, model: nn.Module, task: Task, epoch: int) -> Tensor:
        found = []
        with _measuring(model, task):
            for batch in evaluation_batches(task.samples, task.indices, task.batch_size):
                rows = task.samples.source_positions[batch.indices.numpy()]
                at = torch.from_numpy(rows).to(batch.inputs.device)
                found.append(self._of_batch(model, batch.inputs, batch.labels, at, task.seed, epoch))
        return torch.cat(found)

    def _of_batch(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, rows: Tensor, seed: int, epoch: int
    ) -> Tensor:
        here = _input_gradient(model, inputs, labels)
        total = torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device)
        for draw in range(self.draws):
            v = signs(rows, inputs, seed, epoch, draw)
            moved = _input_gradient(model, inputs + self.step * v, labels)
            squared = ((moved.double() - here.double()) / self.step).flatten(1).square().sum(1)
            total += squared if self.statistic == "squared" else squared.sqrt()
        return total / self.draws


def signs(rows: Tensor, like: Tensor, seed: int, epoch: int, draw: int) -> Tensor:
    """Directions of random signs, a function of (seed, epoch, draw, sample, pixel) whatever the batch or device.

    Args:
        rows: (B,) int64, the samples' positions in the full source.
        like: (B, ...) the inputs, for shape and dtype.
        seed: At least 0.
        epoch: At least 0.
        draw: At least 0.
    """
    key = 0
    for word in (seed, epoch, draw):
        key = _mixed_number(key + word + STEP)
    pixels = like[0].numel()
    counter = torch.arange(pixels, device=like.device)
    start = _mixed(rows * _signed(STEP) + _signed(key))
    bits = _mixed(start[:, None] + counter * _signed(STEP)) < 0
    return (1 - 2 * bits.to(like.dtype)).view(like.shape)


def _input_gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each sample's loss by its inputs; in evaluation mode no sample's depends on another."""
    at = inputs.detach().requires_grad_(True)
    loss = nn.functional.cross_entropy(model(at), labels, reduction="sum")
    return torch.autograd.grad(loss, at)[0]


@contextlib.contextmanager
def _measuring(model: nn.Module, task: Task) -> Iterator[None]:
    # TF32 has three digits; the difference of two gradients a thousandth apart would be noise.
    with (
        evaluating(model),
        torch.enable_grad(),
        runtime.full_float32(),
        torch.autocast(task.device.type, enabled=False),
    ):
        yield


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64 tensors, in arithmetic modulo 2⁶⁴."""
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """x >> n with zeros coming in, which int64 has not."""
    return (x >> n) & (2 ** (64 - n) - 1)


def _mixed_number(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 30)) * FIRST) & MASK
    x = ((x ^ (x >> 27)) * SECOND) & MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The same 64 bits as a signed number."""
    x &= MASK
    return x - 2**64 if x >= 2**63 else x
